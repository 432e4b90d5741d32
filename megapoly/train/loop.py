"""The run: load, step, report, evaluate, save."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megapoly.checkpoint.folders import roots_of
from megapoly.checkpoint.rollbacks import level_rollbacks
from megapoly.checkpoint.save import Saver
from megapoly.data.plan_report import describe, summary
from megapoly.log import duration
from megapoly.model.count import flops_per_token, num_parameters
from megapoly.parallel.mesh import describe_host
from megapoly.parallel.replicas import check_replicas
from megapoly.train.begun import forget_saves, remember_saves
from megapoly.train.metrics import Metrics, progress_line, say_validation
from megapoly.train.rollback import roll_back
from megapoly.train.setup import Run, describe_pipeline
from megapoly.train.start import load_start
from megapoly.train.step import evaluate, train_step
from megapoly.train.stragglers import Stragglers


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    compare: bool
    report: bool
    evaluate: bool
    save: bool
    exit: bool

    @staticmethod
    def after(run: Run, step: int, is_stopped: bool = False) -> "Due":
        """From the intervals of the configuration; the last step does all, one that a signal stops at only saves."""
        train, is_last = run.cfg.train, step == run.prepared.num_steps

        def every(interval: int | None) -> bool:
            return bool(interval) and step % (interval or 1) == 0

        leaves = is_stopped or (every(train.exit_interval) and not is_last)
        saves = is_last or leaves or every(train.save_interval) or step in run.cfg.checkpoint.save_steps
        is_time_left = bool(run.valid_loader.num_batches) and not is_stopped
        evaluates = is_time_left and (is_last or every(train.eval_interval))
        compares = every(run.cfg.parallel.check_weight_hash_across_dp_replicas_interval)
        return Due(compares, saves or evaluates or every(run.cfg.logging.log_interval), evaluates, saves, leaves)


@dataclass(frozen=True)
class Outcome:
    """How training came to its end: stopped by a signal, or at a spike, with the run that goes on before it."""

    is_stopped: bool = False
    following: Run | None = None
    failed_saves: int = 0  # in a row, before it goes on


def train(run: Run) -> bool:
    """Train from the run's starting point to its end, or to exit_interval, going back from spikes on the way.

    Returns False where a signal stopped it before.
    """
    outcome = train_to_spike(run)
    while outcome.following is not None:
        outcome = train_to_spike(outcome.following, outcome.failed_saves)
    return not outcome.is_stopped


def train_to_spike(run: Run, failed_saves: int = 0) -> Outcome:
    """Train from the run's starting point to its end, to exit_interval, or to a spike that it goes back from."""
    introduce(run)
    run = load_start(run)
    begin_record(run)
    say_start(run)
    prepared, console, progress = run.prepared, run.console, run.progress
    metrics = Metrics(run)
    if run.valid_loader.num_batches and prepared.start_step == 0:
        say_validation(console, validate(run, metrics, 0))
    compare_ranks = rank_comparison(run)
    seconds_per_step = 0.0
    reported = step = prepared.start_step
    with make_saver(run, failed_saves) as saver:
        metrics.start_clock()
        is_stopped = progress.stops_after(step)
        while step < prepared.num_steps and not is_stopped:
            step += 1
            if prepared.leaves_out(step):
                metrics.leave_out(step)
                continue  # to one that is trained: the last step of a run is never left out
            progress.enter(f"train step {step}")
            metrics.add(step, train_step(run, step))
            is_stopped = step < prepared.num_steps and progress.stops_after(step)
            due = Due.after(run, step, is_stopped)
            if due.report:
                run.watch.settle()  # before this step could be saved
            if (following := before_spike(run, saver)) is not None:
                metrics.close()
                return Outcome(following=following, failed_saves=saver.failures)
            if due.compare:
                check_replicas(run.buffers, step)
            if due.report:
                row = metrics.read()
                seconds_per_step = 0.9 * seconds_per_step + 0.1 * row["seconds"] if seconds_per_step else row["seconds"]
                left = duration(seconds_per_step * (prepared.num_steps - step))
                console.progress(progress_line(run, row, left))
                row |= compare_ranks(step - reported)
                if due.evaluate:
                    row |= validate(run, metrics, step)
                    say_validation(console, row)
                metrics.write()
                say_finished_stages(run, prepared.samples_after(reported), row["samples"])
                reported = step
                if due.save:
                    progress.enter(f"save after step {step}", is_bounded=False)
                    saver.save(step, run.checkpoint_state(step))
                metrics.start_clock()
            say_news(run, saver)
            if due.exit:
                break
        progress.enter("wait for the last save", is_bounded=False)
        saver.finish(step, run.checkpoint_state(step))
    say_news(run, saver)
    say_end(run, step, is_stopped)
    metrics.close()
    return Outcome(is_stopped)


def before_spike(run: Run, saver: Saver) -> Run | None:
    """The run to go on with where a spike asks for a rollback; None where it goes on as it is."""
    if (spike := run.watch.spike) is None:
        return None
    run.progress.enter(f"rollback from step {spike.step}", is_bounded=False)
    saver.wait()  # a late save would make itself the newest checkpoint, after the one that the run goes back to
    say_news(run, saver)
    return roll_back(run, spike)


def begin_record(run: Run) -> None:
    """A run that begins anew has not been rolled back; one that goes on says what it leaves out."""
    if run.mesh.is_main:
        level_rollbacks(roots_of(run.cfg.checkpoint), run.prepared.is_resume)
        if not run.prepared.is_resume:
            forget_saves(run.cfg)
    for begin, end in run.prepared.plan.left_out:
        run.console.say(f"samples {begin:,} to {end:,} are left out (of {run.prepared.num_samples:,}) after a spike")


def rank_comparison(run: Run) -> Callable[[int], dict[str, Any]]:
    """What compares the ranks' speed after so many steps: it says who is slow and returns entries of the row."""
    if run.mesh.world.size == 1:
        return lambda steps: {}
    stragglers, before = Stragglers(run.mesh), run.progress.loading

    def compare(steps: int) -> dict[str, Any]:
        nonlocal before
        loading, before = (run.progress.loading - before) / steps, run.progress.loading
        entries, warnings = stragglers.compare(loading)
        for line in warnings:
            run.console.say(f"  warning: {line}")
        return entries

    return compare


def validate(run: Run, metrics: Metrics, step: int) -> dict[str, Any]:
    """The held-out losses after a step."""
    run.progress.enter(f"evaluation after step {step}")
    return metrics.validation(evaluate(run).tolist())


def say_end(run: Run, step: int, is_stopped: bool) -> None:
    """Say why the run ends before its last step, where it does."""
    why = run.progress.reason if is_stopped else f"exit_interval {run.cfg.train.exit_interval}"
    if is_stopped and step == run.prepared.start_step:
        run.console.say(f"stopped before any step, nothing to save ({why}); the same command starts again")
    elif step < run.prepared.num_steps:
        run.console.say(f"stopped after step {step} ({why}); the same command goes on")


def make_saver(run: Run, failed_saves: int = 0) -> Saver:
    """What writes the run's checkpoints, after so many that failed; it spares the one that the run goes on from."""
    p = run.prepared
    start = p.checkpoint.folder if p.checkpoint is not None and p.is_resume else None
    return Saver(run.cfg.checkpoint, run.optimizer, p.tokenizer, start, failed_saves)


def say_news(run: Run, saver: Saver) -> None:
    """What came of earlier saves."""
    news = saver.news()
    for line in news:
        run.console.say(f"  {line}")
    if news and run.mesh.is_main:
        try:
            remember_saves(run.cfg)
        except OSError as error:
            run.console.say(f"  warning: {run.cfg.logging.run_dir}/saved_to cannot be written ({error.strerror})")


def introduce(run: Run) -> None:
    """Say what is about to be trained, and on what layout."""
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


def say_start(run: Run) -> None:
    """Say whether the run starts or goes on, from where, and what was skipped for it."""
    cfg, p, console = run.cfg, run.prepared, run.console
    for folder, problem in p.skipped.items():
        console.say(f"warning: {folder} is damaged and was skipped: {problem}")
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
            gaps = (min(end, stage.end_sample) - max(begin, stage.begin_sample) for begin, end in plan.left_out)
            gap = sum(samples for samples in gaps if samples > 0)
            run.console.say(
                f"  {stage.name} is done: {stage.samples:,} samples{f' ({gap:,} left out)' if gap else ''}, "
                f"non-English {report['non_english_share']:.2%} "
                f"({report['deviation_in_samples']['non-English']:+.2f} samples off the plan)"
            )
