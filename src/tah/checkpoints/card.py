"""Model cards: `README.md` of a checkpoint, with metadata for the Hub, made from what is known about the model.

A card of this module contains the line `MARK` and may be written again. A `README.md` without it is the work of a
person and stays. A card contains no path of this machine, but a hash of the weights that it describes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache
from transformers import PreTrainedConfig

from ..config import TaHConfig
from ..errors import short
from ..markdown import estimate, percent, table
from ..names import DATA_FILES, MIXTURES
from ..policy import Rule
from .contents import parameter_counts, version_of, weights_fingerprint
from .untrusted import read_json

if TYPE_CHECKING:
    from ..model import TaHForCausalLM

CARD = "README.md"
MARK = "<!-- This card was made by tah and may be written again. Remove this line to keep your changes. -->"
WEIGHTS = re.compile(r"<!-- weights: (\w+) -->")
RESULTS = "\n\n## Results\n\n"  # head of the last section
PAPER = "https://arxiv.org/abs/2511.08577"
OWN = " (own questions)"  # beside a task whose questions come from a file of the user
PAPER_2 = "https://arxiv.org/abs/2609.35748"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SAMPLED = "T {temperature}, top-p {top_p}, top-k {top_k}"
USE = """\
{imports}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {call}
inputs = tokenizer("What is 12 + 7?", return_tensors="pt").to(model.device)
out = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)
print(tokenizer.decode(out.sequences[0]), out.depth_count)  # answer, and passes of each token
"""


def model_card(
    model: TaHForCausalLM,
    results: Sequence[str | Path | Mapping[str, Any]] = (),
    *,
    name: str | None = None,
    license: str | None = None,
    run: str | Path | None = None,
    auto_map: bool = False,
) -> ModelCard:
    """Return a model card, from what is known about a model.

        model_card(model, ["runs/eval"], license="apache-2.0").save("my-tah/README.md")

    Args:
        model: Model that the card describes.
        results: Evaluations of the model: `-o` directories of `tah eval`, or results of `tah.evaluate`. They become a
            table and the `model-index` of the metadata.
        name: Id of the repository (`OWNER/NAME`), or another name of the model.
        license: License, as an identifier of the Hub. By default that of the base's card, if the base's directory or
            the cache of the Hub has one.
        run: Directory of a stage of `tah train`, whose `run.json` has the recipe.
        auto_map: Whether the checkpoint is saved with `auto_map=True`.

    Raises:
        ValueError: An evaluation is not finished, or is one of other weights; or `run` has no training.
    """
    recipe = None if run is None else trained_with(run)
    if run is not None and recipe is None:
        raise ValueError(f"{run} has no run.json of a training; give the directory of a stage, such as RUN/decider")
    found = [_checked(each, model) for each in results]
    base = base_id(model)
    weights = fingerprint(model)
    title = name or (f"TaH on {base}" if base else f"TaH on a {model.base.config.model_type}")
    data = ModelCardData(
        base_model=base,
        datasets=[recipe["data"]] if recipe and recipe["data"] else None,
        library_name="transformers" if auto_map else "tah",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["tah", "think-at-hard", *(model.model_tags or ())])),
        **({"license": license} if license else _license_of(model)),
    )
    if entries := [entry for each in found for entry in _entries(each)]:
        data.eval_results, data.model_name = entries, title
    sections = {
        "": _introduction(base, recipe, weights, model.config.output in MIXTURES),
        "Use": _use(name, auto_map),
        "Model": table(["", ""], _facts(model, recipe, weights)),
    }
    text = "\n\n".join(f"## {head}\n\n{body}" if head else body for head, body in sections.items() if body)
    if found:
        text += RESULTS + "\n\n".join(map(_results, found))
    mark = f"{MARK}\n<!-- weights: {weights} -->" if weights else MARK
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{mark}\n\n# {title}\n\n{text}\n")


def keep_results(card: ModelCard, earlier: Path, replaced: str | Path | None = None) -> bool:
    """Add the results of an earlier card of tah to a card without results, if both are of the same weights.

    Args:
        card: Card to add to.
        earlier: File of the earlier card. It need not exist.
        replaced: What the new card replaces. A warning with this name says that results are lost.

    Returns:
        Whether results were added.
    """
    if RESULTS in card.text or not earlier.is_file() or not is_ours(earlier):
        return False
    if RESULTS not in earlier.read_text("utf-8", errors="replace"):
        return False
    with suppress(Exception):  # a person may have damaged the metadata
        old = ModelCard.load(earlier)
        weights = WEIGHTS.findall(card.text)[:1]
        if weights and weights == WEIGHTS.findall(old.text)[:1]:
            card.text = card.text.rstrip("\n") + RESULTS + old.text.partition(RESULTS)[2]
            for entry in ("eval_results", "model_name"):  # together they are the model-index
                card.data[entry] = old.data.get(entry)
            return True
    if replaced is not None:
        warnings.warn(
            f"the results in {replaced} are not of these weights, so the new card has none; "
            "add results with tah card --results",
            stacklevel=3,
        )
    return False


def is_ours(path: Path) -> bool:
    """Return whether a card was made by `model_card`, and not changed by a person since who removed its mark."""
    return MARK in path.read_text("utf-8", errors="replace")


def warn_of(place: str | Path) -> None:
    """Warn that a card stays because a person wrote it."""
    warnings.warn(f"{place} is not a card that tah made, so it stays as it is", stacklevel=3)


def base_id(model: TaHForCausalLM) -> str | None:
    """Return the Hub id of the base; None for a base of a local directory, or one that was made in memory."""
    named = model.base.config.name_or_path or ""
    parts = Path(named).parts
    if os.path.isabs(named) or os.path.isdir(named):  # it may be a snapshot in the cache of the Hub
        cached = len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--")
        return parts[-3].removeprefix("models--").replace("--", "/") if cached else None
    return named if HUB_ID.fullmatch(named) else None


def fetch_base_card(model: TaHForCausalLM, token: Any = None) -> None:
    """Download the card of a base on the Hub into the cache, where `model_card` looks for the license. It may fail."""
    if base := base_id(model):
        with suppress(Exception):  # gated, deleted, no card, no network: the license stays unknown
            hf_hub_download(base, CARD, token=token)


def trained_with(directory: str | Path) -> dict[str, Any] | None:
    """Return the facts of a training for its card, from its `run.json`; None if the directory has no training."""
    path = Path(directory)
    try:
        facts = json.loads((path / "run.json").read_text("utf-8"))
        recipe, stage = facts["recipe"], facts["stage"]
        source = str(recipe["data"]["source"])
        hub, suffix = source.partition(":")[0], Path(source).suffix
        found = {
            "name": str(recipe["name"]),
            "method": str(recipe["backbone"]["method"]),
            "train": str(recipe["backbone"]["train"]),
            "stage": str(stage),
            "seed": recipe["seed"],
            "version": facts["versions"].get("tah"),
            "weights": facts.get("weights"),
            "data": hub if HUB_ID.fullmatch(hub) and not os.path.exists(source) and suffix not in DATA_FILES else None,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        quality = json.loads((path / "quality.json").read_text("utf-8"))
        measured = {"share": float(quality["iterated_share"]), "threshold": float(quality["threshold"])}
        found |= measured | {"tokens": int(quality["tokens"])}
    return found


def fingerprint(model: TaHForCausalLM) -> str | None:
    """Return the hash of the weights; None if this process does not have all of them."""
    for weight in model.parameters():
        if weight.is_meta or not weight.numel() or hasattr(weight, "device_mesh"):
            return None
    return weights_fingerprint(model)


# -- sections --------------------------------------------------------------------------------------------------------


def _plain(value: object) -> str:
    """Return a text of a file as Markdown without markup: letters, digits, and marks that have no effect."""
    return re.sub(r"[^\w .,:+-]", "", short(value, str))


def _introduction(base: str | None, recipe: Mapping[str, Any] | None, weights: str | None, mixes: bool) -> str:
    on = f"[{base}](https://huggingface.co/{base})" if base else "a base model"
    made = f" It was trained with the recipe `{_plain(recipe['name'])}`." if recipe else ""
    if recipe and recipe["weights"] and weights and recipe["weights"] != weights:
        made += " Its weights were changed after that."
    method = f"[TaH2]({PAPER_2})" if mixes else f"[Think-at-Hard]({PAPER})"
    return (
        f"This is a {method} model around {on}: a policy chooses the tokens that take another pass through the "
        f"base.{made}"
    )


def _use(name: str | None, auto_map: bool) -> str:
    """Return how to load the model. The placeholder of an unknown name is no path."""
    where = name or "DIRECTORY"
    if auto_map:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        call = f'AutoModelForCausalLM.from_pretrained("{where}", trust_remote_code=True, dtype="auto")'
    else:
        imports = "import tah\nfrom transformers import AutoTokenizer"
        call = f'tah.TaHForCausalLM.from_pretrained("{where}", dtype="auto")'
    code = USE.format(imports=imports, call=call, name=where)
    return f"The model needs the Python package `tah`.\n\n```python\n{code}```"


def _facts(model: TaHForCausalLM, recipe: Mapping[str, Any] | None, weights: str | None) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table of the model: sizes, settings and training."""
    config, sizes = model.config, parameter_counts(model)
    total = sum(sizes.values())
    added = total - sizes["base"]
    yield "parameters", f"{total:,}"
    if total > added:  # weights that are shared out among processes may be empty here
        yield "added to the base", f"{added:,} ({percent(added / (total - added), '.2f')} of the base)"
    yield "dtype", str(model.dtype).removeprefix("torch.")
    parts = set(_idle(config))
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"base_config"}
    for field in dataclasses.fields(TaHConfig):
        value, name = getattr(config, field.name), field.name
        idle = name in parts or (
            name.startswith(("random_", "confidence_")) and not name.startswith(str(config.policy))
        )
        if name not in inherited and value is not None and not idle:
            text = ", ".join(f"{key}: {part}" for key, part in value.items()) if isinstance(value, dict) else value
            yield f"`{name}`", short(text, str)
    if recipe:
        method, train, stage = (_plain(recipe[key]) for key in ("method", "train", "stage"))
        yield "method", f"{method} (trained weights: {train}), last stage {stage}"
        yield "seed", _plain(recipe["seed"])
        if recipe["data"]:
            yield "data", recipe["data"]
        if "share" in recipe and weights and recipe["weights"] == weights:  # otherwise of weights that are gone
            of = f"of {recipe['tokens']:,} held-out supervised tokens"
            yield "iterated share", f"{percent(recipe['share'])} {of}, at the threshold {recipe['threshold']:.4g}"
        yield "trained with", f"tah {_plain(recipe['version'])}"
    else:
        yield "saved with", f"tah {version_of('tah')}"


def _idle(config: TaHConfig) -> Iterator[str]:
    """Yield the fields that have no effect, because the model does not have the part that they describe."""
    if config.next_input != "topk":
        yield "mix_topk"
    if config.next_input != "mlp":
        yield from ("next_input_width", "next_input_norms")
    if config.lora_rank == 0:
        yield from ("lora_alpha", "lora_dropout", "lora_targets")
    if Rule().draws(config):
        yield "threshold"


def _license_of(model: TaHForCausalLM) -> dict[str, Any]:
    """Return the entries for the license in the card of the base; empty if no card is found on this machine."""
    local = Path(model.base.config.name_or_path or "-", CARD)
    with suppress(Exception):  # a card of another person may be any text
        path = local if local.is_file() else try_to_load_from_cache(base_id(model) or "", CARD)
        data = ModelCard.load(Path(path), ignore_metadata_errors=True).data  # type: ignore[arg-type]
        entries = {key: data.get(key) for key in ("license", "license_name", "license_link")}
        return {key: value for key, value in entries.items() if isinstance(value, str)}
    return {}


# -- evaluations -----------------------------------------------------------------------------------------------------


def _checked(source: str | Path | Mapping[str, Any], model: TaHForCausalLM) -> dict[str, Any]:
    """Return the results of an evaluation after a check that it evaluated the weights of the model.

    Raises:
        ValueError: The directory has no results, or they are of other weights.
    """
    if isinstance(source, Mapping):
        name, found = "the evaluation", dict(source)
    else:
        name, path = str(source), Path(source, "results.json")
        if not path.is_file():
            raise ValueError(f"{source} has no results.json; give the -o directory of a finished tah eval")
        found = read_json(path)
    if missing := sorted({"results", "lm_eval", "weights", "dtype", "protocol", "sampling", "rule"} - found.keys()):
        raise ValueError(f"{name} has no entry {missing[0]}; give the -o directory of a finished tah eval")
    dtype = getattr(torch, str(found["dtype"]), None)
    if found["weights"] not in (weights_fingerprint(model), weights_fingerprint(model, dtype=dtype)):
        raise ValueError(f"{name} is of other weights than the model; evaluate the model with tah eval")
    return found


def _entries(found: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield the entries of the `model-index`: one for each policy and task. Accuracies are from 0 to 1."""
    own = _own_questions(found)

    def entry(row: Mapping[str, Any], metric: str, value: float, more: Mapping[str, Any]) -> EvalResult:
        rule = {"policy": row["policy"], "threshold": found["rule"].get("threshold")}
        return EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=row["task"] + OWN * (row["task"] in own),
            metric_type=metric,
            metric_name=f"{metric}, policy {row['policy']}",
            metric_value=round(value, 4),
            metric_args={**rule, "protocol": found["protocol"], **more},
        )

    for row in found["results"]:
        counts = {"questions": row["questions"], "answers": row["answers"]}
        share = {"iterated_share": round(row["iterated_share"], 4)} if "iterated_share" in row else {}
        yield entry(row, "accuracy", row["accuracy"]["value"], counts | share)
    for row in found["lm_eval"]:
        for metric, value in row["metrics"].items():
            if "_stderr," not in metric:
                yield entry(row, metric.partition(",")[0], value, {"filter": metric.partition(",")[2]})


def _own_questions(found: Mapping[str, Any]) -> Collection[str]:
    """Return the tasks of an evaluation whose questions come from a file of the user."""
    return found.get("overrides", {}).get("data", {}).keys()


def _results(found: Mapping[str, Any]) -> str:
    """Return the table of an evaluation and the settings of its protocol."""
    sampling, own = found["sampling"], _own_questions(found)
    drawn = "greedy" if sampling["temperature"] < 1e-3 else SAMPLED.format(**sampling)
    versions = found.get("versions", {})
    settings = (
        f"`tah eval` (tah {versions.get('tah')}, lm-eval {versions.get('lm_eval')}), protocol {found['protocol']}: "
        f"{drawn}, at most {sampling['max_new_tokens']} tokens, threshold {found['rule'].get('threshold')}, "
        f"{found['dtype']}. Brackets hold 95 % intervals."
    )
    rows: Iterable[Sequence[str]] = [
        (
            *(row["policy"], row["task"] + OWN * (row["task"] in own)),
            *(f"{row['questions']:,}", f"{row['answers']:,}"),
            *("".join(estimate(row["accuracy"])), percent(row.get("iterated_share")), f"{row.get('cost', 1):.3f}"),
        )
        for row in found["results"]
    ]
    head = ["policy", "task", "questions", "answers", "accuracy", "iterated", "passes per token"]
    lines = [table(head, rows, words=2)] if rows else []
    for row in found["lm_eval"]:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
        lines.append(f"{row['policy']} on {row['task']}: {metrics}")
    return "\n\n".join([settings, *lines])
