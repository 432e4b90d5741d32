"""Text from a checkpoint, on one process."""

from dataclasses import replace

import torch
from torch import Tensor

from megapoly.checkpoint.load import CheckpointReader, check_same_model
from megapoly.model.backends import choose_backends
from megapoly.model.count import parameter_shapes
from megapoly.model.transformer import Transformer
from megapoly.parallel.mesh import Axis
from megapoly.parallel.stage import Stage
from megapoly.parallel.tensor import Placement, sharded_parameters
from megapoly.sections import PrecisionConfig


@torch.no_grad()
def load_model(reader: CheckpointReader, device: torch.device | str = "cpu") -> Transformer:
    """The whole model of a checkpoint of any layout, in its training type, on one device."""
    m = reader.config.model
    check_same_model(reader, m, reader.vocab_size, parameter_shapes(m, reader.vocab_size))
    stage = Stage(0, m.num_layers, has_embedding=True, has_head=True)
    place = Placement(Axis("tp"), sequence_parallel=False, dtype=reader.dtype, device=torch.device(device))
    backends = choose_backends(PrecisionConfig(), place.device)
    cfg = replace(reader.config, train=replace(reader.config.train, torch_compile=False))  # each length would compile
    model = Transformer(cfg, reader.vocab_size, stage, place, backends)
    for name, parameter, (shard,) in sharded_parameters(model):
        parameter.zero_()
        shard.held(parameter).copy_(reader.get(name))
    return model


@torch.no_grad()
def generate(
    model: Transformer, prompt: list[int], max_new_tokens: int, *, eod: int, temperature: float, top_k: int, seed: int
) -> list[int]:
    """Continue a prompt of token ids (an empty one starts a document after eod); stops at eod, which is not returned.

    Temperature 0 takes the likeliest token, else one of the top_k likeliest is drawn. Every step runs the whole
    context (no key/value cache), which is cut to the model's longest sequence.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ids = list(prompt) or [eod]
    for _ in range(max_new_tokens):
        context = torch.tensor([ids[-model.m.max_positions :]], device=model.head_weight.device)
        logits_V: Tensor = model.logits(model(context))[-1, : model.vocab_size].float().cpu()
        if temperature < 1e-6:
            following = int(logits_V.argmax())
        else:
            top = torch.topk(logits_V / temperature, min(top_k, len(logits_V)))
            choice = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            following = int(top.indices[choice])
        if following == eod:
            break
        ids.append(following)
    return ids[max(len(prompt), 1) :]
