"""The run: load, step, report, evaluate, save."""

from dataclasses import dataclass
from pathlib import Path

from megapoly.checkpoint.load import load_checkpoint
from megapoly.checkpoint.rollbacks import forget_rollbacks
from megapoly.checkpoint.save import save_checkpoint
from megapoly.data.plan_report import describe, summary
from megapoly.log import duration
from megapoly.model.count import flops_per_token, num_parameters
from megapoly.parallel.mesh import describe_host
from megapoly.parallel.replicas import check_replicas
from megapoly.train.metrics import Metrics, progress_line, say_validation
from megapoly.train.rollback import roll_back
from megapoly.train.setup import Run, describe_pipeline
from megapoly.train.step import evaluate, train_step


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    compare: bool
    report: bool
    evaluate: bool
    save: bool
    exit: bool

    @staticmethod
    def after(run: Run, step: int) -> "Due":
        """From the intervals of the configuration; the last step does everything."""
        train, is_last = run.cfg.train, step == run.prepared.num_steps

        def every(interval: int | None) -> bool:
            return bool(interval) and step % (interval or 1) == 0

        leaves = every(train.exit_interval) and not is_last
        saves = is_last or leaves or every(train.save_interval)
        evaluates = bool(run.valid_loader.num_batches) and (is_last or every(train.eval_interval))
        compares = every(run.cfg.parallel.check_weight_hash_across_dp_replicas_interval)
        return Due(compares, saves or evaluates or every(run.cfg.logging.log_interval), evaluates, saves, leaves)


def train(run: Run) -> Run | None:
    """Train from the run's starting point to its end, or to exit_interval; the run to go on with after a rollback."""
    cfg, prepared, console = run.cfg, run.prepared, run.console
    introduce(run)
    begin_record(run)
    load_start(run)
    metrics = Metrics(run)
    if run.valid_loader.num_batches and prepared.start_step == 0:
        say_validation(console, metrics.validation(evaluate(run).tolist()))
    seconds_per_step = 0.0
    reported = prepared.start_step
    metrics.start_clock()
    for step in range(prepared.start_step + 1, prepared.num_steps + 1):
        if prepared.leaves_out(step):
            metrics.leave_out(step)
            continue
        metrics.add(step, train_step(run, step))
        due = Due.after(run, step)
        if due.report:
            run.watch.settle()  # before this step could be saved
        if run.watch.spike is not None and (back := roll_back(run, run.watch.spike)) is not None:
            metrics.close()
            return back
        if due.compare:
            check_replicas(run.buffers, step)
        if due.report:
            row = metrics.read()
            seconds_per_step = 0.9 * seconds_per_step + 0.1 * row["seconds"] if seconds_per_step else row["seconds"]
            left = duration(seconds_per_step * (prepared.num_steps - step))
            console.progress(progress_line(run, row, left))
            if due.evaluate:
                row |= metrics.validation(evaluate(run).tolist())
                say_validation(console, row)
            metrics.write()
            say_finished_stages(run, prepared.samples_after(reported), row["samples"])
            reported = step
            if due.save:
                assert cfg.checkpoint.save is not None
                root = Path(cfg.checkpoint.save)
                folder = save_checkpoint(root, step, run.optimizer, run.checkpoint_state(step), prepared.tokenizer)
                console.say(f"  saved {folder}")
            metrics.start_clock()
        if due.exit:
            console.say(
                f"stopped after step {step} (exit_interval {cfg.train.exit_interval}); the same command goes on"
            )
            break
    metrics.close()
    return None


def load_start(run: Run) -> None:
    """Load what the run starts from."""
    prepared = run.prepared
    if prepared.checkpoint is not None:
        load_checkpoint(prepared.checkpoint.folder, run.optimizer, weights_only=not prepared.takes_full_state)
        if prepared.takes_full_state:
            run.loss_scaler.restore(prepared.checkpoint.loss_scaler)
            run.watch.restore(prepared.checkpoint.watch)
            run.optimizer.num_steps = prepared.checkpoint.optimizer_steps


def begin_record(run: Run) -> None:
    """A run that begins anew has not been rolled back; one that goes on says what it leaves out."""
    cfg, plan = run.cfg.checkpoint, run.prepared.plan
    if not run.prepared.is_resume and run.mesh.is_main and cfg.save is not None:
        forget_rollbacks(Path(cfg.save))
    for begin, end in plan.left_out:
        run.console.say(f"samples {begin:,} to {end:,} are left out (of {run.prepared.num_samples:,}) after a spike")


def introduce(run: Run) -> None:
    """Say what is about to be trained, on what layout, and whether it starts or goes on."""
    cfg, p, mesh = run.cfg, run.prepared, run.mesh
    console = run.console
    console.say(
        f"model: {num_parameters(cfg.model, p.vocab_size):,} parameters, {cfg.model.num_layers} layers x "
        f"{cfg.model.hidden_size}, vocabulary {p.vocab_size:,}, {cfg.precision.parameters}; "
        f"{flops_per_token(cfg.model, p.vocab_size) / 1e9:.3g} GFLOP a token"
    )
    console.say(
        f"layout: TP {mesh.tp.size} x PP {mesh.pp.size} x DP {mesh.dp.size}"
        f"{f' x CP {mesh.cp.size}' if mesh.cp.size > 1 else ''} on {mesh.device.type}"
        f"{', sequence parallel' if cfg.parallel.sequence_parallel else ''}; "
        f"{describe_pipeline(cfg, p.vocab_size, mesh.dp.size)}; batch {p.batch_sizes} x {p.plan.block_length} tokens"
    )
    console.say(run.chunks[0].backends.describe())
    console.say(describe_host(mesh.device))
    console.say(p.plan.sampler().describe())
    console.say(describe(p.plan))
    if p.start_step:
        assert p.checkpoint is not None
        verb = "resuming" if p.is_resume else "continuing in"
        console.say(f"{verb} {cfg.logging.run_dir} from {p.checkpoint.folder} at step {p.start_step}/{p.num_steps}")
        for change in p.changes:
            console.say(f"the plan changed for what is to come: {change}")
        decay, was = p.decay_end, p.checkpoint.state.get("lr_decay_iters")
        if was is not None and was != decay:
            console.say(f"note: the learning rate decayed until step {was} before, until step {decay} now")
    elif p.checkpoint is not None:
        console.say(f"starting {cfg.logging.run_dir} anew with the weights of {p.checkpoint.folder}")
    else:
        console.say(f"starting {cfg.logging.run_dir} anew: {p.num_steps} steps, {p.num_samples:,} samples")


def say_finished_stages(run: Run, before: int, after: int) -> None:
    """For each stage that ended between two numbers of samples: the realised share, and how far it is off the plan."""
    plan = run.prepared.plan
    if not any(before < stage.end_sample <= after for stage in plan.stages):
        return
    for stage, report in zip(plan.stages, summary(plan)["stages"], strict=True):
        if before < stage.end_sample <= after:
            run.console.say(
                f"  {stage.name} is done: {stage.samples:,} samples, non-English {report['non_english_share']:.2%} "
                f"({report['deviation_in_samples']['non-English']:+.2f} samples off the plan)"
            )
