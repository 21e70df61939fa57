"""Parts of trainings with state that Trainer's checkpoints lack: callbacks, data sets, samplers, losses, optimizers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

WORDS, LENGTH = 64, 12


# -- data -------------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Fixed rows of tokens, longer and shorter ones."""

    def __init__(self, count: int) -> None:
        dice = torch.Generator().manual_seed(1)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count,), generator=dice)
        self.rows = [torch.randint(4, WORDS, (int(length),), generator=dice) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> torch.Tensor:
        """Return the tokens of a row."""
        return self.rows[index]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.row(index)
        return {"input_ids": row, "labels": row}


class Drawing(Rows):
    """Rows with noise from a generator: its own, or one of the global ones."""

    def __init__(self, count: int, generator: Any) -> None:
        super().__init__(count)
        self.generator = generator

    def row(self, index: int) -> torch.Tensor:
        """Return the tokens, shifted by chance."""
        if isinstance(self.generator, torch.Generator):
            noise = int(torch.randint(0, 9, (), generator=self.generator))
        elif isinstance(self.generator, numpy.random.Generator):
            noise = int(self.generator.integers(0, 9))
        elif isinstance(self.generator, random.Random):
            noise = self.generator.randrange(9)
        else:
            noise = random.randrange(3) + int(numpy.random.randint(3)) + int(torch.randint(0, 3, ()))
        return (self.rows[index] + noise) % WORDS


class Levels(Rows):
    """Rows that a callback makes harder."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.level = 0

    def row(self, index: int) -> torch.Tensor:
        """Return the tokens, shifted by the level."""
        return (self.rows[index] + self.level) % WORDS


class Stream(IterableDataset):  # type: ignore[type-arg]
    """A stream whose end is not known before; workers share it out among themselves."""

    def __init__(self, count: int) -> None:
        self.inside = Rows(count)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, len(self.inside), every):
            yield self.inside[index]


class Padded:
    """A collator that pads."""

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: torch.Tensor, filling: int) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, longest - len(values)), value=filling)

        return {
            "input_ids": torch.stack([padded(row["input_ids"], 0) for row in rows]),
            "labels": torch.stack([padded(row["labels"], -100) for row in rows]),
            "attention_mask": torch.stack([padded(torch.ones_like(row["input_ids"]), 0) for row in rows]),
        }


class Counting(Padded):
    """A collator that draws and counts."""

    def __init__(self) -> None:
        self.dice, self.calls = random.Random(3), 0

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.calls += 1
        batch = super().__call__(rows)
        batch["input_ids"] = (batch["input_ids"] + self.dice.randrange(9) + self.calls) % WORDS
        return batch


class Masking(Padded):
    """A collator that hides tokens by torch's global generator."""

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        batch["input_ids"] = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.2, 3)
        return batch


class Shuffled(torch.utils.data.Sampler):  # type: ignore[type-arg]
    """A sampler that a script has written."""

    def __init__(self, length: int) -> None:
        self.length, self.dice, self.passes = length, numpy.random.RandomState(2), 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(self.dice.permutation(self.length).tolist())

    def __len__(self) -> int:
        return self.length


class OwnGenerator:
    """For a Trainer: a sampler with a generator of its own."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        data: Any = self.train_dataset  # type: ignore[attr-defined]
        return torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(7))


class OwnSampler:
    """For a Trainer: a sampler of the script's own class."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return Shuffled(len(self.train_dataset))  # type: ignore[attr-defined]


# -- losses -----------------------------------------------------------------------------------------------------------


class LearntLoss:
    """For a Trainer: a loss with a parameter of its own in the optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_variance = torch.nn.Parameter(torch.zeros(()))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Add the parameter to the optimizer."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if not any(one is self.log_variance for group in optimizer.param_groups for one in group["params"]):  # train() twice
            optimizer.add_param_group({"params": [self.log_variance]})
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Weigh the loss."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        loss, *others = found if return_outputs else (found,)
        loss = loss * torch.exp(-self.log_variance) + self.log_variance
        return (loss, *others) if return_outputs else loss


class Teacher:
    """For a Trainer: a momentum teacher, whose answers the loss asks for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        import copy

        super().__init__(*args, **kwargs)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)  # type: ignore[attr-defined]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Add the distance from the teacher, and let it follow."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        wanted = self.teacher(input_ids=inputs["input_ids"]).logits
        if model.training:
            for own, followed in zip(self.teacher.parameters(), model.parameters(), strict=True):
                own.data.lerp_(followed.data, 0.1)
        loss = loss + torch.nn.functional.mse_loss(outputs.logits, wanted)
        return (loss, outputs) if return_outputs else loss


class Averaging:
    """For a Trainer: reports means of its own in each log line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: dict[str, list[float]] = {"train": [], "eval": []}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Note the perplexity."""
        found = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        loss = found[0] if isinstance(found, tuple) else found
        self.parts["train" if model.training else "eval"].append(loss.detach().exp().item())
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean."""
        parts = self.parts["train" if self.model.training else "eval"]  # type: ignore[attr-defined]
        if parts:
            logs["perplexity"] = sum(parts) / len(parts)
            parts.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


# -- optimizers -------------------------------------------------------------------------------------------------------


class Lookahead(torch.optim.AdamW):
    """An optimizer with slow weights that are in no state_dict."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-2)
        self.steps = 0
        self.slow = [weight.detach().clone() for group in self.param_groups for weight in group["params"]]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Step, and meet the slow weights after every third."""
        super().step(closure)
        self.steps += 1
        if self.steps % 3 == 0:
            with torch.no_grad():
                fast_ones = (weight for group in self.param_groups for weight in group["params"])
                for slow, fast in zip(self.slow, fast_ones, strict=True):
                    slow.lerp_(fast, 0.5)
                    fast.copy_(slow)


# -- callbacks --------------------------------------------------------------------------------------------------------


class Average(TrainerCallback):
    """An average of the weights (EMA)."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        """Begin with the weights."""
        self.of = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        """Follow the weights."""
        for name, weight in model.named_parameters():
            self.of[name].lerp_(weight.detach(), 0.1)


class Thaws(TrainerCallback):
    """Trains without the first half of the parameters for an epoch."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        """Freeze them."""
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad or state.global_step]
        self.frozen = trained[: len(trained) // 2]
        if state.global_step == 0:
            for name, weight in model.named_parameters():
                weight.requires_grad_(weight.requires_grad and name not in self.frozen)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        """Thaw them in the second epoch."""
        if state.epoch is not None and int(state.epoch) == 1:
            for name, weight in model.named_parameters():
                if name in self.frozen:
                    weight.requires_grad_(True)


class Raises(TrainerCallback):
    """Raises the level of the data set after every third step."""

    def __init__(self, data: Levels) -> None:
        self.data = data

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Count."""
        self.data.level += state.global_step % 3 == 0


class Remembers(TrainerCallback):
    """Plain values of all kinds, and a random number for each step."""

    def __init__(self) -> None:
        self.count, self.seen, self.by_step = 0, [], {}  # type: ignore[var-annotated]
        self.dice = random.Random(5)

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Remember."""
        self.count += 1
        self.seen.append((state.global_step, self.dice.random()))
        self.by_step[state.global_step] = numpy.float32(state.global_step) / 3


class DrawsGlobally(TrainerCallback):
    """Draws from the global generators after each step, as augmentations on the GPU do."""

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Draw."""
        self.newest = (random.random(), float(numpy.random.rand()), float(torch.rand(())))


class ChangesRate(TrainerCallback):
    """Halves the learning rate of a group by hand in the middle of the training, as some scripts do."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        """Halve."""
        if state.global_step == 5:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.05


class Watches(TrainerCallback):
    """What callbacks see at the borders of passes, how often they are told, and numbers that they draw there."""

    def __init__(self) -> None:
        self.passes, self.begins, self.ends = 0, [], []  # type: ignore[var-annotated]

    def see(self, state):  # type: ignore[no-untyped-def]
        """Return what a state shows."""
        return [state.epoch, state.global_step, state.best_metric, len(state.log_history), float(torch.rand(()))]

    def on_epoch_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Note, and make a generator for this pass."""
        self.passes += 1
        self.begins.append(self.see(state))
        self.dice = random.Random(self.passes)

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Draw from the pass's generator."""
        self.drawn = self.dice.random()

    def on_epoch_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Note."""
        self.ends.append(self.see(state))


class Swaps(Average):
    """Gives the model the averaged weights when the training ends, as scripts do that average weights."""

    def on_train_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        """Copy."""
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(self.of[name])


class Writes(TrainerCallback):
    """A tracker: one line for each log line, in a file that all launches of a run append to.

    Args:
        path: of the file.
    """

    per_launch = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        """Write a line."""
        import json

        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
