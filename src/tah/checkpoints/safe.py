"""Find and check checkpoints, load them strictly, save them atomically, and publish them."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import FORMER_TENSORS, KERNELS, current_tensor
from ..core.compat import LOADING, drop_renaming, set_attention
from ..core.families import UnsupportedBase
from ..core.quantised import is_quantised
from ..errors import some
from .adapter import BASE, base_source, facts_of, is_own, load_adapter, own_fields
from .card import CARD, fetch_base_card, is_ours, keep_results, model_card, trained_with, warn_of
from .convert import converted, reconversion
from .hub import OPTIONS, Snapshot, is_repository
from .original import is_original
from .publish import is_mapped, set_auto_map, upload
from .untrusted import check_model, checked_config, load_base, read_heads, refuse_incomplete, weight_files

if TYPE_CHECKING:
    from ..model import TaHForCausalLM

PLACES = {"subfolder", "revision", *OPTIONS}  # options that locate a model in a repository
UPLOAD = {  # options of `save_pretrained` with `push_to_hub`
    *("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")
}
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|base\.json")


class SafeCheckpoint:
    """Mixin of `PreTrainedModel` that raises for incomplete checkpoints, and saves atomically."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a TaH checkpoint like `from_pretrained` of transformers, but strictly.

        An original checkpoint is converted into the cache first. A checkpoint of a model with a quantised base contains
        the adapter alone. Its base is then loaded from its own source, with the remaining options, or it is the option
        `base`: a model, or a directory or hub id.

        Raises:
            ValueError: The weights are not safetensors, a tensor is missing, unexpected or has another shape, or a file
                is damaged; or `base` is given for a checkpoint that contains its base.
        """
        source = named = pretrained_model_name_or_path
        advice = ""
        if isinstance(source, (str, os.PathLike)):  # otherwise the caller passes the tensors
            source = find(source, kwargs, cls)  # type: ignore[arg-type]
            advice = reconversion(source)
            check_checkpoint(source, cls, kwargs)  # type: ignore[arg-type]
            if Path(source, BASE).is_file():
                return _load_on_base(cls, source, str(named), dict(kwargs))  # type: ignore[arg-type]
            if kwargs.get("quantization_config") is not None:
                raise ValueError(
                    f"{source}: quantization_config would quantise LoRA and decider, too; load without it, and quantise"
                    " model.base with a filter that leaves out layers with 'lora_' in their name (torchao: quantize_)"
                )
            kwargs = _without_places(kwargs) | {"use_safetensors": True}
        if kwargs.pop("base", None) is not None:
            raise ValueError(f"{named}: this checkpoint contains its base; remove base=")
        wants_info = kwargs.pop("output_loading_info", False)
        ignored = ("mismatched",) if kwargs.pop("ignore_mismatched_sizes", False) else ()
        kwargs |= {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }  # `refuse_incomplete` raises for them, by name
        former = {f"^{old}\\.": f"{new}." for old, new in FORMER_TENSORS.items()}
        kwargs["key_mapping"] = former | (kwargs.get("key_mapping") or {})
        try:
            with LOADING:
                model, info = super().from_pretrained(source, *args, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            advice = advice or "; copy them again"
            raise ValueError(f"{source}: the weights are damaged or cut short ({error}){advice}") from error
        drop_renaming(model, former)
        if source != str(named):
            model.name_or_path = model.config.name_or_path = str(named)
        refuse_incomplete(info, f"{source}: not a complete TaH checkpoint", advice, ignored)
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        *args: Any,
        push_to_hub: bool = False,
        auto_map: bool | None = None,
        card: ModelCard | None = None,
        **kwargs: Any,
    ) -> None:
        """Save configuration, weights (safetensors) and a model card. An older checkpoint stays until the new one is
        complete.

        All files are first written to a temporary directory inside the target, and then moved one by one. The tokenizer
        is saved by its own `save_pretrained`, as in transformers. With a quantised base the weights are those of the
        adapter alone, and `base.json` has the facts of the base.

        Args:
            save_directory: Target directory, created if it is missing.
            args: Further arguments of `save_pretrained` of transformers.
            push_to_hub: Whether to upload the saved files to `repo_id`, by default the name of the directory.
            auto_map: Whether the checkpoint also has `modeling_tah.py`, a module of one import, with which the Auto
                classes load it in a process that has not imported `tah` (`trust_remote_code=True`). By default it has
                the module if the model was loaded from such a checkpoint.
            card: Content of `README.md`; by default that of `tah.model_card`, with the results in an earlier card of
                the same weights. A card that tah did not write stays.
            kwargs: Further arguments of `save_pretrained` of transformers, and of `push_to_hub`.
        """
        target = Path(save_directory)
        if quantised := is_quantised(self.base):  # type: ignore[attr-defined]
            given = kwargs.get("state_dict") or self.state_dict()  # type: ignore[attr-defined]
            kwargs["state_dict"] = {name: tensor for name, tensor in given.items() if is_own(name)}
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(target, *args, **kwargs)  # type: ignore[misc]
        hub = {name: kwargs.pop(name) for name in UPLOAD & kwargs.keys()} if push_to_hub else {}
        repository: str = hub.pop("repo_id", target.name)
        fresh = not target.exists()
        target.mkdir(parents=True, exist_ok=True)
        try:
            # Inside the target, which may be a separate file system, so that each move is a rename.
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as temporary:
                work = Path(temporary)
                super().save_pretrained(temporary, *args, **kwargs)  # type: ignore[misc]
                if quantised:
                    facts = facts_of(self.base)  # type: ignore[attr-defined]
                    (work / BASE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
                if (work / "config.json").is_file():  # other processes, and adapters of PEFT, have none
                    mapped = self._is_mapped(auto_map)
                    set_auto_map(work, mapped)
                    if not (target / CARD).exists() or is_ours(target / CARD):
                        name = repository if push_to_hub else None
                        made = card or self._card(mapped, name, hub.get("token"), target)
                        (work / CARD).write_text(str(made), "utf-8")
                    elif card is not None:
                        warn_of(target / CARD)
                names = os.listdir(work)
                replace_files(work, target)
        except BaseException:
            if fresh and not any(target.iterdir()):
                target.rmdir()
            raise
        if push_to_hub:
            upload(target, [*names, CARD], repository, keep=card is None, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        auto_map: bool | None = None,
        card: ModelCard | None = None,
        tags: Sequence[str] | str | None = None,
        max_shard_size: int | str = "50GB",
        **options: Any,
    ) -> Any:
        """Save the model into a temporary directory, and upload it to the Hub in one commit.

        A model card in the repository that tah did not write stays. The tokenizer is uploaded by its own
        `push_to_hub`; call it after this one, which makes the card.

        Args:
            repo_id: Id of the repository (`OWNER/NAME`), created if it does not exist.
            auto_map: As in `save_pretrained`.
            card: Model card; by default that of `tah.model_card`, with the license of the base's card on the Hub, and
                with the results in a card of the same weights on the Hub or in the directory that the model was loaded
                from.
            tags: Further tags of the card.
            max_shard_size: Largest size of a file of weights.
            options: `commit_message`, `commit_description`, `private`, `token`, `revision` and `create_pr`, as in
                transformers.

        Returns:
            Description of the commit, from `huggingface_hub`.
        """
        made = card or self._card(self._is_mapped(auto_map), repo_id, options.get("token"))
        if own := [tags] if isinstance(tags, str) else [*(tags or ())]:
            made.data["tags"] = list(dict.fromkeys([*made.data.get("tags", ()), *own]))
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, auto_map=auto_map, card=made, max_shard_size=max_shard_size)
            return upload(Path(directory), os.listdir(directory), repo_id, keep=card is None, **options)

    def _card(self, auto_map: bool, name: str | None, token: Any, directory: Path | None = None) -> ModelCard:
        """Return the card of this model. With the name of a repository the base's card is fetched for its license.

        The facts of a training and the results are those in `directory`, which the card is for, or in the directory
        that the model was loaded from.
        """
        if name is not None:
            fetch_base_card(self, token)  # type: ignore[arg-type]
        loaded = self.name_or_path  # type: ignore[attr-defined]
        places = dict.fromkeys(Path(place) for place in (directory, loaded) if place and os.path.isdir(place))
        run = next(filter(trained_with, places), None)
        made = model_card(self, name=name, run=run, auto_map=auto_map)  # type: ignore[arg-type]
        for place in places:
            keep_results(made, place / CARD, place / CARD if place == directory else None)
        return made

    def _is_mapped(self, wanted: bool | None) -> bool:
        """Return `wanted`; for None, whether the model was loaded from a checkpoint with the `auto_map` of tah."""
        return is_mapped(self.config.auto_map or {}) if wanted is None else wanted  # type: ignore[attr-defined]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing. The Auto classes call this method after a load with `trust_remote_code=True`.

        That of transformers makes `save_pretrained` copy the source files of the class into the checkpoint.
        """


def find(
    source: str | os.PathLike[str],
    options: Mapping[str, Any],
    model_class: type[TaHForCausalLM] | None,
    weights: bool = True,
) -> str:
    """Return the directory of a model.

    The weights of a hub repository are downloaded after a check of its configuration. An original checkpoint, local or
    on the hub, is converted into the user's cache.

    Args:
        source: Path of a directory, or a hub id.
        options: Options of `from_pretrained`.
        model_class: Class of the model for an original checkpoint. With None such a checkpoint is an error.
        weights: Whether to download the weights, too. False is enough for the configuration and the tokenizer.

    Raises:
        ValueError: There is no such directory or repository, or the checkpoint cannot be converted.
        UnsupportedBase: The source is an original checkpoint, and `model_class` is None.
    """
    name, subfolder = os.fspath(source), options.get("subfolder") or ""
    if options.get("gguf_file"):  # transformers finds and reads it
        return name
    found: Path | Snapshot
    if os.path.isdir(name):
        found = directory = Path(name, subfolder)
    elif not is_repository(name):
        raise ValueError(f"no model {name!r}: there is no such directory")
    else:
        places = {key: options[key] for key in OPTIONS & options.keys()}
        found = Snapshot(name, options.get("revision"), subfolder, **places)
        directory = found.directory
    if is_original(directory):
        if model_class is None:
            raise UnsupportedBase(f"{name}: this is a TaH model already; load it with TaHForCausalLM.from_pretrained")
        return str(converted(name, found, model_class))
    if isinstance(found, Snapshot):
        checked_config(directory, options)
        if weights:
            code = ["*.py"] if options.get("trust_remote_code") else []
            found.complete(*code, variant=options.get("variant") or "")
    return str(directory) if subfolder or isinstance(found, Snapshot) else name


def check_checkpoint(
    directory: str, model_class: type[TaHForCausalLM], options: Mapping[str, Any] | None = None
) -> None:
    """Check a TaH checkpoint without loading it. Missing tensors of the base are found at loading only.

    Args:
        directory: Path of the checkpoint.
        model_class: Class of the model.
        options: Options of `from_pretrained`.

    Raises:
        ValueError: The checkpoint is damaged or incomplete.
    """
    options = options or {}
    given = options.get("config")
    if Path(directory, BASE).is_file():  # `load_adapter` compares settings and tensors
        read_heads(weight_files(Path(directory), checked_config(directory, options)))
        return

    def empty() -> TaHForCausalLM:
        chosen = {name: options[name] for name in KERNELS if options.get(name) is not None}
        own = isinstance(given, PreTrainedConfig)
        config: Any = copy.deepcopy(given) if own else model_class.config_class.from_pretrained(directory, **chosen)
        set_attention(config, "eager")  # kernels do not change shapes, and may not be installed
        built.append(model_class(config))
        return built[0]

    built: list[TaHForCausalLM] = []
    try:
        held = {current_tensor(name) for name in check_model(directory, empty, options).tensors}
        if missing := [name for name, _ in built[0].named_parameters() if is_own(name) and name not in held]:
            raise ValueError(f"{directory}: not a complete TaH checkpoint: missing tensors {some(missing)}")
    except ValueError as error:
        if advice := reconversion(directory):
            raise ValueError(f"{str(error).removesuffix('; copy them again')}{advice}") from error
        raise


def _load_on_base(model_class: type[TaHForCausalLM], directory: str, named: str, options: dict[str, Any]) -> Any:
    """Load a checkpoint that contains the adapter alone, and its base.

    Args:
        model_class: Class of the model.
        directory: Directory of the checkpoint.
        named: What the caller named: the directory, or a hub id.
        options: Options of `from_pretrained`: `base`, `config`, fields of the configuration, and options for the base.

    Raises:
        ValueError: The base cannot be found or loaded, the adapter belongs to another one, or there are options for a
            base that is loaded already.
    """
    base, config = options.pop("base", None), options.pop("config", None)
    wants_info = options.pop("output_loading_info", False)
    for name in ("subfolder", "revision", "adapter_kwargs", "_from_auto"):  # of the checkpoint; Auto classes add two
        options.pop(name, None)
    fields = {name: options.pop(name) for name in own_fields() if name in options}
    if config is not None:  # the Auto classes load it, and move fields and the attention from the options into it
        if not isinstance(config, PreTrainedConfig):
            config = model_class.config_class.from_pretrained(config)
        fields = {name: getattr(config, name) for name in own_fields()} | fields
        options.setdefault("attn_implementation", config._attn_implementation)
    options.setdefault("dtype", options.pop("torch_dtype", None))
    automatic = [name for name, value in options.items() if value is None or (name == "dtype" and value == "auto")]
    for name in automatic:  # as in the checkpoint
        del options[name]
    if isinstance(base, PreTrainedModel):
        if unused := options.keys() - {*OPTIONS, "trust_remote_code", "use_safetensors"}:
            raise ValueError(f"base= is a model, so there is nothing to load with {', '.join(sorted(unused))}")
    else:
        name, known = base_source(directory, base)
        if checked_config(find(name, options, None, weights=False), options).get("quantization_config"):
            del known["quantization_config"]  # the files of the base are quantised already
        base = load_plain(name, **known | options)
    model = load_adapter(model_class, base, directory, **fields)
    model.name_or_path = model.config.name_or_path = named
    if "auto_map" in (described := checked_config(directory, options)):
        model.config.auto_map = described["auto_map"]
    return (model, {}) if wants_info else model


def load_plain(source: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """Load a base model.

    Args:
        source: Path of a directory, or a hub id.
        options: Options of `from_pretrained`.

    Raises:
        ValueError: The base does not exist or cannot be loaded, or tensors are missing or have another shape.
    """
    directory = find(source, options, None)
    model = load_base(directory, _without_places(options), str(source))
    if directory != str(source):
        model.name_or_path = model.config.name_or_path = str(source)
    return model


def _without_places(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = options.get("gguf_file") is not None
    return {name: value for name, value in options.items() if kept or name not in PLACES}


def replace_files(source: Path, target: Path) -> None:
    """Move the files of a complete checkpoint over an older one, and delete the remaining weights of the older one."""
    target.mkdir(parents=True, exist_ok=True)
    new = {path.name for path in source.iterdir()}
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)
    if any(WEIGHTS.fullmatch(name) for name in new):
        for old in target.iterdir():
            if WEIGHTS.fullmatch(old.name) and old.name not in new:
                old.unlink()
