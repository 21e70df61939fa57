"""SpotArguments beside the dataclasses whose options a script parses with it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import trl
from accelerate.commands.launch import launch_command_parser
from transformers import HfArgumentParser, TrainingArguments

from hf_spot import SpotArguments
from hf_spot.launch.options import parser

CONFIGS = [
    one
    for name in dir(trl)
    if inspect.isclass(one := getattr(trl, name, None)) and name.endswith("Config") and issubclass(one, TrainingArguments)
]
OWN = {
    "notice": ("none", "none"),
    "signals": ("SIGUSR2", "SIGUSR2"),
    "grace_s": ("9", 9.0),
    "cadence": ("auto", "auto"),
    "keep_checkpoints": ("7", 7),
    "upload_workers": ("2", 2),
    "on_event": ("https://example.com", "https://example.com"),
    "allow_batch_change": ("true", True),
    "exact_on_any_gpus": ("true", True),
}


def words(**more: str) -> list[str]:
    return [word for name, text in more.items() for word in (f"--{name}", text)]


def test_trainings_arguments_and_ours_are_parsed_together(tmp_path: Path) -> None:
    args = words(output_dir=str(tmp_path), save_total_limit="3", **{name: text for name, (text, _) in OWN.items()})
    training, spot = HfArgumentParser((TrainingArguments, SpotArguments)).parse_args_into_dataclasses(args)
    assert training.save_total_limit == 3
    assert {name: getattr(spot, name) for name in OWN} == {name: value for name, (_, value) in OWN.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what TRL gives to transformers
@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.__name__)
def test_trls_arguments_and_ours_are_parsed_together(config: type, tmp_path: Path) -> None:
    classes = (trl.ScriptArguments, config, trl.ModelConfig, SpotArguments)
    args = words(output_dir=str(tmp_path), dataset_name="d", model_name_or_path="m", save_total_limit="3", keep_checkpoints="7")
    parsed = trl.TrlParser(classes).parse_args_and_config([*args, "--use_cpu", "--bf16", "false"])
    assert [type(one) for one in parsed] == list(classes)
    assert (parsed[1].save_total_limit, parsed[3].keep_checkpoints) == (3, 7)


def test_there_are_configs_of_trl() -> None:
    assert {trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig, trl.RewardConfig} <= set(CONFIGS)


def test_no_option_of_ours_is_one_of_accelerate_launch() -> None:
    accelerates = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    ours = {flag for one in parser()._action_groups[0]._group_actions for flag in one.option_strings}
    assert "--save-total-limit" in ours and not ours & accelerates


def test_each_option_of_launch_is_shown_in_one_spelling_and_read_in_both() -> None:
    made = parser()
    for action in made._actions:
        long = [one for one in action.option_strings if one.startswith("--")]
        assert len({one.replace("-", "_") for one in long}) == len(long), long
        for one in long:
            spellings = {f"--{one[2:].replace('-', '_')}", f"--{one[2:].replace('_', '-')}"}
            assert all(made._option_string_actions[spelling] is action for spelling in spellings), one
    settings = {one.name for one in dataclasses.fields(SpotArguments)}
    assert settings <= {action.dest for action in made._actions}
