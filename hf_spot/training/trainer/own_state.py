"""Finds the state of a training that Trainer does not save: its subclass, callbacks, data, loss, other models."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import safetensors.torch
import torch
import transformers.trainer
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_spot.training.state.carried import CarriedState
from hf_spot.training.state.data_side import parts_of
from hf_spot.training.state.values import is_tensor
from hf_spot.training.state.walk import IN_STATE_DICT, Found, Walk, is_of_script, may_keep_state
from hf_spot.training.upstream import FLATTEN, HAS_ADAPTER, TORCH_SAVE
from hf_spot.training.upstream.name import replaced_on

# Attributes that belong to a process and not to the training, such as which weights an inference engine has loaded.
_OF_THIS_PROCESS = re.compile(r"trainer\.(_last_loaded_step|_hf_spot\w*)$")


class SavedTensors:
    """Records which tensors are written to the files of a checkpoint.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._memory: set[int] = set()
        self._names: dict[str, torch.Size] = {}
        self._in_safetensors: set[str] = set()
        self._translated: frozenset[str] | None = None
        self._everything = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record all tensors that are written within the block."""
        self._memory, self._names, self._in_safetensors, self._translated = set(), {}, set(), None
        self._everything = bool(self._trainer.is_deepspeed_enabled or self._trainer.is_fsdp_enabled)

        def noting(note: Callable[[Any], None], plain: Callable[..., Any]) -> Callable[..., Any]:
            def write(obj: Any, *args: Any, **kwargs: Any) -> Any:
                note(obj)
                return plain(obj, *args, **kwargs)

            return write

        with (
            TORCH_SAVE.replaced(torch, partial(noting, self._note)),
            FLATTEN.replaced(safetensors.torch, partial(noting, self.note)),
        ):
            yield

    def note(self, tensors: dict[str, torch.Tensor]) -> None:
        """Record tensors that are written to a file for safetensors."""
        if isinstance(tensors, dict):
            self._in_safetensors.update(tensors)
        self._note(tensors)

    def _note(self, obj: Any) -> None:
        if self._everything:
            return
        if isinstance(obj, torch.Tensor):
            if is_tensor(obj):
                self._memory.add(obj.untyped_storage().data_ptr())
        elif isinstance(obj, dict):
            for name, value in obj.items():
                if isinstance(name, str) and isinstance(value, torch.Tensor):
                    self._names[name] = value.shape
                self._note(value)
        elif isinstance(obj, (list, tuple)):
            for value in obj:
                self._note(value)

    def holds(self, path: str, tensor: torch.Tensor) -> bool:
        """Return whether the files contain a tensor, or one of the same name and shape that was derived from it."""
        of_model, _, name = path.partition(".")
        if self._everything and of_model == "model":
            return True
        if of_model == "optimizer" and self._trainer.is_deepspeed_enabled:
            return True  # its parameters are DeepSpeed's own, which it divides among the ranks and saves
        if tensor.numel() and tensor.untyped_storage().data_ptr() in self._memory:
            return True
        return of_model == "model" and (self._names.get(name) == tensor.shape or name in self._written_in_other_words())

    def _written_in_other_words(self) -> frozenset[str]:
        """Return the names of tensors that ``save_pretrained`` has written with the Hub's names and shapes.

        `hf_spot.training.trainer.weights` loads them by ``from_pretrained``, and refuses files from which one is missing.
        """
        if self._translated is None:
            model = self._trainer.model
            is_whole = isinstance(model, PreTrainedModel) and not HAS_ADAPTER.of(
                model
            )  # of the other, only the adapter is written
            names = set(model.state_dict()) if is_whole else set()  # type: ignore[union-attr]
            ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
            is_translated = bool(names and self._in_safetensors - names)
            self._translated = frozenset(names - self._in_safetensors - {*ignored} if is_translated else ())
        return self._translated


def own_state(trainer: Trainer) -> CarriedState:
    """Return the `CarriedState` of a training.

    Args:
        trainer: the Trainer, about to train.
    """

    def find(walk: Walk) -> Iterator[Found]:
        return _find(trainer, walk)

    return CarriedState(
        find,
        lambda: _new_walk(trainer),
        lambda: list(_trained(trainer)),
        trainer.args.process_index,
        lambda path: path.startswith("trainer._") and bool(_OF_THIS_PROCESS.match(path)),
        divided=_is_divided(trainer),
    )


def _is_divided(trainer: Trainer) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _new_walk(trainer: Trainer) -> Walk:
    """Return a walk that skips Trainer's own objects and hf_spot's."""
    handler = trainer.callback_handler
    ours = [one for one in handler.callbacks if type(one).__module__.partition(".")[0] in ("hf_spot", "transformers")]
    skip = [trainer.args, trainer.state, trainer.control, handler, trainer.accelerator, trainer.optimizer]
    kinds = (Trainer, TrainingArguments, TrainerState, TrainerControl)
    # Modules of FSDP and DeepSpeed count and note what belongs to a process.
    return Walk([*skip, trainer.lr_scheduler, trainer.processing_class, *ours], kinds, libraries=not _is_divided(trainer))


def _find(trainer: Trainer, walk: Walk) -> Iterator[Found]:
    yield from walk.plain_attributes("args", trainer.args, lambda name: name not in _NOT_OF_ARGS)
    if trainer.label_smoother is not None:
        yield from walk.plain_attributes("trainer.label_smoother", trainer.label_smoother)
    if trainer.model is not None:
        yield from walk.module("model", trainer.model)
        for name in ("config", "generation_config"):
            if (config := getattr(trainer.model, name, None)) is not None and hasattr(config, "__dict__"):
                yield from walk.plain_attributes(f"model.{name}", config, lambda key: key not in _SET_BY_ITSELF)
    own = names_of_trainer()
    yield from walk.attributes("trainer", trainer, lambda name: name not in own)
    for name, function in (vars(trainer) | replaced_on(trainer)).items():  # methods that a script has put on the object
        if name in own and isinstance(function, FunctionType):
            yield from walk.function(f"trainer.{name}", function, 0)
    counted: dict[str, int] = {}
    for callback in trainer.callback_handler.callbacks:
        name = type(callback).__name__
        counted[name] = counted.get(name, 0) + 1
        number = "" if counted[name] == 1 else f"#{counted[name]}"
        yield from walk.value(f"callbacks.{name}{number}", callback)
    for name, handed in (
        ("optimizer", trainer.optimizer),
        ("lr_scheduler", trainer.lr_scheduler),
        ("train_dataset", trainer.train_dataset),
        ("eval_dataset", trainer.eval_dataset),
        ("data_collator", trainer.data_collator),
        ("compute_loss_func", trainer.compute_loss_func),
        ("compute_metrics", trainer.compute_metrics),
        ("preprocess_logits_for_metrics", trainer.preprocess_logits_for_metrics),
    ):
        yield from _handed(walk, name, handed)
    for path, part in parts_of(trainer.callback_handler.train_dataloader):
        if callable(part) and not is_of_script(type(part)):
            yield from walk.value(path, part)
        if is_of_script(type(part)):
            yield from walk.attributes(path, part, lambda name: name not in ("data_source", "dataset"))
        elif may_keep_state(type(part)) and isinstance(part, (torch.utils.data.Sampler, torch.utils.data.Subset)):
            yield from walk.numbers(path, part, lambda name: name in ("weights", "indices"))
    for at, group in enumerate(getattr(trainer.optimizer, "param_groups", ())):
        for place, tensor in enumerate(group["params"]):
            yield from walk.tensor(f"optimizer.param_groups[{at}].params[{place}]", tensor)


# What names a place, or belongs to a process; the batch, of which `batch_size` keeps the samples; what hf_spot itself sets.
_NOT_OF_ARGS = frozenset(
    (
        "output_dir",
        "logging_dir",
        "run_name",
        "resume_from_checkpoint",
        "local_rank",
        "_n_gpu",
        "hub_token",
        "push_to_hub_token",
        "hub_model_id",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "average_tokens_across_devices",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "report_to",
        "distributed_state",
    )
)
# Of a configuration: what saves set, what the first forward pass finds out, and what Trainer sets when a training begins.
_SET_BY_ITSELF = frozenset(
    (
        *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
        "problem_type",
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    )
)


def _handed(walk: Walk, name: str, handed: Any) -> Iterator[Found]:
    if name in ("optimizer", "lr_scheduler"):
        inner = getattr(handed, name.removeprefix("lr_"), handed)  # accelerate wraps it
        if inner is not None and is_of_script(type(inner)):
            yield from walk.attributes(name, inner, lambda key: key not in IN_STATE_DICT)
        elif inner is not None and may_keep_state(type(inner)):
            yield from walk.numbers(name, inner, lambda key: key not in IN_STATE_DICT)
        for at, function in enumerate(getattr(inner, "lr_lambdas", ())):
            yield from walk.value(f"{name}.lr_lambdas[{at}]", function)
    elif isinstance(handed, dict) and name == "eval_dataset":
        for key, one in handed.items():
            yield from walk.value(f"{name}[{key!r}]", one)
    elif not isinstance(handed, (list, tuple, str, type(None))):  # lists are data, not state
        yield from walk.value(name, handed)


def _trained(trainer: Trainer) -> Iterator[torch.Tensor]:
    for group in getattr(trainer.optimizer, "param_groups", ()):
        yield from group["params"]


@lru_cache(maxsize=1)
def names_of_trainer() -> frozenset[str]:
    """Return the attributes that Trainer itself uses: it saves them, or `trainer/` handles them one by one."""
    source = Path(str(transformers.trainer.__file__)).read_text(encoding="utf-8")
    return frozenset(re.findall(r"\bself\.(\w+)", source))
