"""Every internal name of other libraries that hf_spot uses, and what is lost without it.

Libraries rename private names and change parameters without notice. `check` tests the names of this table when a training
begins. If a promise depends on a name that is missing or has other parameters, the training is refused; if only speed or
convenience is lost, one line says what. All other modules use these names through the constants below
(``tests/test_house.py`` enforces it). Modules below ``training/`` can't: they work without a missing name, or raise, and are
listed so that `check` reports it.

`check` imports nothing: a library that was not imported is not used. ``tests/training/test_upstream.py`` proves that the
libraries still call what hf_spot replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

from packaging.version import Version

from hf_spot.errors import ConfigError
from hf_spot.log import warn_for_all
from hf_spot.training.upstream.name import Name, Scope
from hf_spot.training.upstream.versions import how_to_install, tell_untested, version_of

# -- the trainings that need a name ---------------------------------------------------------------------------------------


def _is_stream(trainer: Any) -> bool:
    from torch.utils.data import IterableDataset

    return isinstance(trainer.train_dataset, IterableDataset)


def _is_exact(trainer: Any) -> bool:
    settings = (getattr(one, "args", None) for one in trainer.callback_handler.callbacks)
    return any(getattr(one, "exact_on_any_gpus", False) for one in settings)


def _has_callback(name: str, trainer: Any) -> bool:
    return any(type(one).__name__ == name for one in trainer.callback_handler.callbacks)


def _is_at_least(library: str, *version: int) -> bool:
    return Version(version_of(library)).release[: len(version)] >= version


ONLY: dict[str, Callable[[Any], bool]] = {
    "several micro-batches per step": lambda trainer: trainer.args.gradient_accumulation_steps > 1,
    "datasets without a length": _is_stream,
    "FSDP": lambda trainer: bool(trainer.is_fsdp_enabled),
    "DeepSpeed": lambda trainer: bool(trainer.is_deepspeed_enabled),
    "push_to_hub": lambda trainer: bool(trainer.args.push_to_hub),
    "GPUs": lambda trainer: trainer.args.device.type not in ("cpu", "meta"),
    "TensorBoard": partial(_has_callback, "TensorBoardCallback"),
    "Weights & Biases": partial(_has_callback, "WandbCallback"),
    "MLflow": partial(_has_callback, "MLflowCallback"),
    "Trackio": partial(_has_callback, "TrackioCallback"),
    "SwanLab": partial(_has_callback, "SwanLabCallback"),
    "Comet": partial(_has_callback, "CometCallback"),
    "ClearML": partial(_has_callback, "ClearMLCallback"),
    "DVCLive": partial(_has_callback, "DVCLiveCallback"),
    "Aim": partial(_has_callback, "AimCallback"),
    "TRL's SFTTrainer": lambda trainer: any(kind.__name__ == "SFTTrainer" for kind in type(trainer).__mro__),
    # Older versions divide by all steps, or lack this name; if it exists, it is used.
    "transformers from 5.23 on": lambda trainer: _is_at_least("transformers", 5, 23),
    "load_best_model_at_end": lambda trainer: bool(trainer.args.load_best_model_at_end),
    "hyperparameter_search()": lambda trainer: trainer.hp_search_backend is not None,
    "--exact-on-any-gpus": _is_exact,
    "datasets without a length, and --exact-on-any-gpus": lambda trainer: _is_stream(trainer) or _is_exact(trainer),
}

# -- the table ------------------------------------------------------------------------------------------------------------

_BOTH = Scope.TRAINER | Scope.LOOP
_TRAINER = "transformers.trainer:Trainer"
_HANDLER = "transformers.trainer_callback:CallbackHandler"
_LOADER = "torch.utils.data.dataloader:DataLoader"
_SHARD = "accelerate.data_loader:DataLoaderShard"
_DISPATCHER = "accelerate.data_loader:DataLoaderDispatcher"
_ADAPTER = "accelerate.data_loader:DataLoaderAdapter"
_PLANNER = "torch.distributed.checkpoint.default_planner:DefaultSavePlanner"


def _name(
    kind: Literal["function", "method", "attribute", "class", "value"],
    owner: str,
    name: str,
    takes: str,
    users: str,
    without: str,
    *,
    told: bool = False,
    scope: Scope = Scope.TRAINER,
    only: str = "",
    optional: bool = False,
) -> Name:
    return Name(owner, name, kind, takes, tuple(users.split()), without, not told, scope, only, optional)


_method, _function = partial(_name, "method"), partial(_name, "function")


def _attribute(owner: str, name: str, users: str, without: str, **more: Any) -> Name:
    return _name("attribute", owner, name, "", users, without, **more)


def _value(owner: str, name: str, users: str, without: str, **more: Any) -> Name:
    return _name("value", owner, name, "", users, without, **more)


# Trainer: the course of a training
_STEPS = "an optimizer step may contain other samples after a resume"
_STOPPED = "a training that was stopped early does one step too many when it is resumed"
_EVALUATIONS = "a notice can't end an evaluation, and a skipped evaluation is not made up for"
_LINES = "log lines and train_loss of an interrupted training differ from those of an uninterrupted one"
_STREAMS = "a stream is resumed at the wrong sample"
_RANDOM = "random numbers after a resume differ from those of an uninterrupted training"

TRAIN = _method(_TRAINER, "train", "resume_from_checkpoint, trial, …", "training.trainer.entry", "nothing is saved or resumed")
ON_TRAIN_BEGIN = _method(
    _HANDLER,
    "on_train_begin",
    "…",
    "training.trainer.entry training.trainer.restore training.trainer.resumed_events",
    "a training in which SpotCallback can't work is not refused",
)
CALLBACK_HANDLER = _attribute(
    _TRAINER,
    "callback_handler",
    "training.trainer.entry training.trainer.held_errors training.trainer.restore training.trainer.resumed_events "
    "training.trainer.trackers training.trainer.wanted_end",
    "SpotCallback is not found, so nothing is saved",
)
CALLBACKS = _attribute(
    _HANDLER,
    "callbacks",
    "training.trainer.entry training.trainer.held_errors training.trainer.restore training.trainer.resumed_events "
    "training.trainer.saves training.trainer.trackers",
    "SpotCallback is not found, so nothing is saved",
)
RUN_EPOCH = _method(_TRAINER, "_run_epoch", "*, model, epoch, trial, start_time, …", "training.trainer.evaluation", _STOPPED)
LOG_SAVE_EVALUATE = _method(
    _TRAINER,
    "_maybe_log_save_evaluate",
    "tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, *, learning_rate",
    "training.trainer.evaluation training.trainer.log_window",
    _STOPPED,
)
ON_EPOCH_BEGIN = _method(
    _HANDLER,
    "on_epoch_begin",
    "args, state, control",
    "training.trainer.resumed_events",
    "callbacks see and do something else at the start of an epoch that is resumed",
)
ON_EPOCH_END = _method(
    _HANDLER,
    "on_epoch_end",
    "args, state, control",
    "training.trainer.evaluation training.trainer.restore training.trainer.resumed_events",
    _STOPPED,
)
ON_TRAIN_END = _method(
    _HANDLER,
    "on_train_end",
    "args, state, control",
    "training.trainer.restore",
    "callbacks do nothing at the end of a training that an earlier launch has finished",
)
LOSS_SO_FAR = _attribute(
    _TRAINER,
    "_tr_loss",
    "training.trainer.evaluation training.trainer.log_window training.trainer.exact_steps",
    _LINES,
)
TOTAL_LOSS = _attribute(_TRAINER, "_total_loss_scalar", "training.trainer.log_window", _LINES)
LAST_LOGGED = _attribute(_TRAINER, "_globalstep_last_logged", "training.trainer.log_window", _LINES)
FIRST_STEP = _attribute(
    _TRAINER, "_initial_global_step", "training.trainer.log_window", _LINES, told=True, only="transformers from 5.23 on"
)
FIRST_TOKENS = _attribute(_TRAINER, "_initial_num_input_tokens_seen", "training.trainer.log_window", _LINES, told=True)
FINALIZE = _method(
    _TRAINER, "_finalize_training", "trial, num_train_samples, start_time", "training.trainer.log_window", _LINES
)
INITIAL_VALUES = _method(_TRAINER, "set_initial_training_values", "…", "training.trainer.log_window", _LINES)
LOG_LINE = _method(_TRAINER, "log", "logs, start_time", "training.trainer.log_window", _LINES)
STORE_FLOS = _method(_TRAINER, "store_flos", "", "training.trainer.log_window", _LINES)
TRAINING_STEP = _method(
    _TRAINER,
    "training_step",
    "model, inputs, …",
    "training.trainer.step_losses training.trainer.passed_over training.trainer.exact_steps",
    "--on-nan rollback passes over nothing, and losses of steps that are done again after a kill are not compared",
    told=True,
)
# --exact-on-any-gpus
_EXACT: Any = {"only": "--exact-on-any-gpus"}
_GPUS = "results depend on the number of GPUs"
_EXACT_STEPS = "training.trainer.exact_steps"
_EXACT_STEPS_AND_METRICS = f"{_EXACT_STEPS} training.trainer.exact_metrics"
COUNT_ITEMS = _method(_TRAINER, "_get_num_items_in_batch", "batch_samples, device", _EXACT_STEPS, _GPUS, **_EXACT)
COUNT_FLOS = _method(_TRAINER, "floating_point_ops", "inputs", _EXACT_STEPS, _GPUS, **_EXACT)
COUNT_TOKENS = _method(_TRAINER, "_track_num_input_tokens", "inputs", _EXACT_STEPS, _GPUS, **_EXACT)
TRAIN_LOADER = _method(_TRAINER, "get_train_dataloader", "", _EXACT_STEPS, _GPUS, **_EXACT)
NESTED_GATHER = _function("transformers.trainer", "nested_gather", "tensors, …", _EXACT_STEPS, _GPUS, **_EXACT)
ALL_BATCHES = _attribute(
    "accelerate.data_loader:BatchSamplerShard", "batch_sampler", _EXACT_STEPS_AND_METRICS, _GPUS, optional=True, **_EXACT
)
PREDICTION_STEP = _method(_TRAINER, "prediction_step", "…", "training.trainer.exact_metrics", _GPUS, **_EXACT)
FETCH = _method(
    "torch.utils.data._utils.fetch:_MapDatasetFetcher",
    "fetch",
    "possibly_batched_index",
    "training.data.micro_batches",
    _GPUS,
    **_EXACT,
)

EVALUATE = _method(
    _TRAINER, "_evaluate", "trial, ignore_keys_for_eval", "training.trainer.evaluation training.trainer.restore", _EVALUATIONS
)
EVALUATION_LOOP = _method(
    _TRAINER,
    "evaluation_loop",
    "…",
    "training.data.evaluation_workers",
    "evaluations of a resumed training begin with other random states in persistent workers",
)
BEST_METRIC = _method(
    _TRAINER,
    "_determine_best_metric",
    "metrics, trial",
    "training.trainer.evaluation training.trainer.restore",
    "an interrupted training may end with another best model",
)
ON_EVALUATE = _method(_HANDLER, "on_evaluate", "args, state, control, …", "training.trainer.evaluation", _EVALUATIONS)
INIT_TRAINING_STATE = _method(
    _TRAINER, "_init_training_state", "…", "training.trainer.streams", _STREAMS, only="datasets without a length"
)
GET_BATCH_SAMPLES = _method(
    _TRAINER,
    "get_batch_samples",
    "epoch_iterator, …",
    "training.trainer.streams training.trainer.exact_steps",
    "there is no warning about a stream that gives other samples after a resume, and results depend on the number of GPUs",
    only="datasets without a length, and --exact-on-any-gpus",
)
TRAIN_BATCH_SIZE = _attribute(_TRAINER, "_train_batch_size", "training.trainer.batch_size training.trainer.exact_steps", _STEPS)
TOTAL_BATCH_SIZE = _method(_TRAINER, "get_total_train_batch_size", "args", "training.trainer.batch_size", _STEPS)
ACCUMULATION = _attribute(
    _TRAINER,
    "current_gradient_accumulation_steps",
    "training.trainer.accumulation training.trainer.exact_steps",
    "a notice can't interrupt a step of several micro-batches",
    only="several micro-batches per step",
)
FLOS = _attribute(
    _TRAINER,
    "current_flos",
    "training.trainer.accumulation training.trainer.log_window",
    "a step that a notice interrupted is counted twice",
)
FOREACH_COPY = _function(
    "torch",
    "_foreach_copy_",
    "…",
    "training.trainer.accumulation",
    "a notice can't interrupt a step of several micro-batches",
    only="several micro-batches per step",
)
LOAD_RNG_STATE = _method(
    _TRAINER, "_load_rng_state", "checkpoint", "training.trainer.random_states training.trainer.restore", _RANDOM
)
SAVE_RNG_STATE = _method(
    _TRAINER, "_save_rng_state", "output_dir", "training.trainer.random_states training.trainer.saves", _RANDOM
)
TRAIN_TOKENS = _attribute(
    "trl.trainer.sft_trainer:SFTTrainer",
    "_total_train_tokens",
    "training.trainer.resume_fixes training.trainer.exact_metrics",
    "num_tokens in the log restarts at 0 after a resume",
    told=True,
    only="TRL's SFTTrainer",
    optional=True,
)
OWN_METRICS = _attribute(
    "trl.trainer.sft_trainer:SFTTrainer",
    "_metrics",
    "training.trainer.exact_metrics",
    "with --exact-on-any-gpus TRL's entropy and token accuracy depend on the number of GPUs",
    told=True,
    only="TRL's SFTTrainer",
    optional=True,
)
EXPORTABLE = _name(
    "class",
    "transformers.trainer_callback",
    "ExportableState",
    "…",
    "training.trainer.resume_fixes",
    "EarlyStoppingCallback forgets its count at a resume",
)
CALLBACK_STATES = _attribute(
    "transformers.trainer_callback:TrainerState",
    "stateful_callbacks",
    "training.trainer.resume_fixes",
    "EarlyStoppingCallback forgets its count at a resume",
)

# Trainer: what a resume loads
_WEIGHTS = "a resume may leave layers as they were initialised"
LOAD_FROM_CHECKPOINT = _method(
    _TRAINER,
    "_load_from_checkpoint",
    "…",
    "training.trainer.weights training.trainer.restore training.trainer.resumed_events",
    _WEIGHTS,
)
HAS_ADAPTER = _attribute(
    "transformers.modeling_utils:PreTrainedModel",
    "_hf_peft_config_loaded",
    "training.trainer.weights training.trainer.own_state",
    "a training of an adapter that add_adapter() has added can't be resumed",
    told=True,
)
WARN_AFTER_LOAD = _method(_TRAINER, "_issue_warnings_after_load", "load_result", "training.trainer.weights", _WEIGHTS)
LOAD_BEST_MODEL = _method(
    _TRAINER,
    "_load_best_model",
    "",
    "training.trainer.restore",
    "a finished training that is started again does not end with its best model",
    only="load_best_model_at_end",
)
SEARCH_SETUP = _method(
    _TRAINER,
    "_hp_search_setup",
    "trial",
    "training.trainer.trials",
    "a trial of a hyperparameter search is not recognized in the next launch",
    only="hyperparameter_search()",
)
TRIAL_FOLDER = _method(
    _TRAINER,
    "_get_output_dir",
    "trial",
    "training.trainer.trials training.trainer.saves",
    "the checkpoints of a hyperparameter search are not found",
    only="hyperparameter_search()",
)
PREPARE = _method(
    _TRAINER,
    "_prepare_for_training",
    "max_steps, train_dataloader, resume_from_checkpoint",
    "training.trainer.restore",
    "a finished training that is started again does not end with its model",
    only="DeepSpeed",
)
LOAD_OPTIMIZER = _method(
    _TRAINER,
    "_load_optimizer_and_scheduler",
    "checkpoint",
    "training.trainer.restore training.trainer.resumed_events training.trainer.weights",
    "a second train() of the same Trainer begins with a new optimizer if the first one was finished by an earlier launch",
)
SKIP_FIRST_BATCHES = _function(
    "transformers.trainer",
    "skip_first_batches",
    "dataloader, num_batches",
    "training.trainer.resume_fixes training.trainer.streams",
    "a resumed training sees samples twice",
)

# Trainer: what a save writes
_FULL_DISK = "a full disk ends the training, or makes its ranks wait for each other forever"
SAVE_CHECKPOINT = _method(
    _TRAINER,
    "_save_checkpoint",
    "…",
    "training.trainer.saves",
    "checkpoints are uploaded without the random states that a resume needs",
)
SAVE = _method(_TRAINER, "_save", "…", "training.trainer.saves", _FULL_DISK)
SAVE_MODEL = _method(
    _TRAINER,
    "save_model",
    "…",
    "training.trainer.saves",
    "a script that reads files right after its own save_model may find them incomplete",
)
SAVE_PRETRAINED = _method(
    "transformers.modeling_utils:PreTrainedModel",
    "save_pretrained",
    "save_directory, is_main_process, state_dict, …",
    "training.trainer.model_files",
    "training waits while the files of the model are prepared",
    told=True,
)
SAVE_OPTIMIZER = _method(
    _TRAINER,
    "_save_optimizer_and_scheduler",
    "…",
    "training.trainer.saves",
    "a script that reads files right after its own save may find them incomplete",
)
SAVE_STATE = _method("transformers.trainer_callback:TrainerState", "save_to_json", "…", "training.trainer.saves", _FULL_DISK)
PUSH_FROM_CHECKPOINT = _method(
    _TRAINER,
    "_push_from_checkpoint",
    "…",
    "training.trainer.saves",
    "a checkpoint that is incomplete because of a full disk is pushed to the Hub",
    only="push_to_hub",
)
ROTATE = _function(
    "transformers.trainer",
    "rotate_checkpoints",
    "…",
    "training.trainer.saves",
    "an older checkpoint is deleted from this disk before the new one is complete",
    told=True,
)
CALL_EVENT = _method(
    _HANDLER,
    "call_event",
    "event, args, state, control, …",
    "training.trainer.held_errors training.trainer.wanted_end",
    "an exception in a callback prevents the checkpoint that is due, and an end that a callback asks for at a notice is lost",
    told=True,
)
ON_SAVE = _method(
    _HANDLER,
    "on_save",
    "args, state, control",
    "training.trainer.saves",
    "callbacks are told of a save that failed because of a full disk",
    told=True,
)
ON_LOG = _method(
    _HANDLER, "on_log", "args, state, control, logs, …", "training.trainer.metrics", "the log has no spot/… metrics", told=True
)
_BOARD: Any = {"told": True, "only": "TensorBoard"}
_BOARDS = "TensorBoard shows each launch as a separate run, and repeated steps twice"
_OF_TENSORBOARD = "transformers.integrations.integration_utils:TensorBoardCallback"
TENSORBOARD_DIR = _attribute(_OF_TENSORBOARD, "logging_dir", "training.trainer.trackers", _BOARDS, **_BOARD)
TENSORBOARD_WRITER = _attribute(_OF_TENSORBOARD, "tb_writer", "training.trainer.trackers", _BOARDS, **_BOARD)
SUMMARY_WRITER = _attribute(_OF_TENSORBOARD, "_SummaryWriter", "training.trainer.trackers", _BOARDS, **_BOARD)
# A tracker's callback remembers that it is set up, and then continues the tracker run of an earlier training.
_TRACKER_RUNS = "a second training of a process continues the tracker run of the first"


def _set_up(callback: str, only: str) -> Name:
    owner = f"transformers.integrations.integration_utils:{callback}"
    return _attribute(owner, "_initialized", "training.trainer.trackers", _TRACKER_RUNS, told=True, only=only)


WANDB_SET_UP = _set_up("WandbCallback", "Weights & Biases")
MLFLOW_SET_UP = _set_up("MLflowCallback", "MLflow")
TRACKIO_SET_UP = _set_up("TrackioCallback", "Trackio")
SWANLAB_SET_UP = _set_up("SwanLabCallback", "SwanLab")
COMET_SET_UP = _set_up("CometCallback", "Comet")
CLEARML_SET_UP = _set_up("ClearMLCallback", "ClearML")
DVCLIVE_SET_UP = _set_up("DVCLiveCallback", "DVCLive")
_OF_AIM, _AIM = "aim.sdk.adapters.hugging_face:AimCallback", "Aim shows each launch as a run of its own"
AIM_HASH = _attribute(_OF_AIM, "_run_hash", "training.trainer.trackers", _AIM, told=True, only="Aim")
AIM_RUN = _attribute(_OF_AIM, "_run", "training.trainer.trackers", _AIM, told=True, only="Aim")
PEFT_CONFIG = _attribute(  # other models have none
    "peft.peft_model:PeftModel",
    "peft_config",
    "training.trainer.saves training.trainer.engines training.trainer.description",
    "the first save of an adapter reserves memory for the whole model",
    told=True,
    optional=True,
)

# Copies that are made while training continues
_HIDDEN = "a write through it while a save copies the weights is only found by a sample of their values"
_memory = partial(
    _name, "value", "torch:Tensor", takes="", users="training.saving.hidden_writes", without=_HIDDEN, told=True, scope=_BOTH
)
TENSOR_DATA = _memory("data")
TENSOR_NUMPY = _memory("numpy")
TENSOR_ARRAY = _memory("__array__")
TENSOR_STORAGE = _memory("untyped_storage")
TENSOR_OLD_STORAGE = _memory("storage")
TENSOR_TYPED_STORAGE = _memory("_typed_storage")
TENSOR_ADDRESS = _memory("data_ptr")
TENSOR_DLPACK = _memory("__dlpack__")
STORAGE_HANDLE = _value(
    "torch:UntypedStorage",
    "_cdata",
    "training.saving.live_tensors training.saving.frozen training.saving.async_writer",
    "saves copy weights and optimizer states while training waits",
    told=True,
    scope=_BOTH,
)
USE_COUNT = _function(
    "torch._C",
    "_storage_Use_Count",
    "…",
    "training.saving.live_tensors",
    "saves copy weights and optimizer states while training waits",
    told=True,
    scope=_BOTH,
)

# Files that are written while training continues
_WAITS = "training waits until a checkpoint is written"
_SHARDS_WAIT = "training waits until a sharded checkpoint is written"
_WHOLE_SHARDS = "each of several machines fetches all shards of a checkpoint, not only what its ranks read"
_TOGETHER = "torch.distributed.checkpoint"
_FSDP: Any = {"told": True, "only": "FSDP"}
TORCH_SAVE = _function("torch", "save", "obj, f, …", "training.trainer.saves training.trainer.own_state", _FULL_DISK)
OPEN_ZIPFILE = _function(
    "torch.serialization", "_open_zipfile_writer", "name_or_buffer", "training.saving.async_writer", _WAITS, told=True
)
SAVE_INTO_ZIPFILE = _function(
    "torch.serialization",
    "_save",
    "obj, zip_file, pickle_module, pickle_protocol, _disable_byteorder_record",
    "training.saving.async_writer",
    "training waits while the states of its optimizer are serialized",
    told=True,
)
SERIALIZATION_SETTINGS = _value(
    "torch.serialization",
    "_serialization_tls",
    "training.saving.async_writer",
    "training waits while the states of its optimizer are serialized",
    told=True,
)
FILE_LIKE = _attribute("torch.serialization:_opener", "file_like", "training.saving.async_writer", _WAITS, told=True)
WRITE_RECORD = _method("torch._C:PyTorchFileWriter", "write_record", "…", "training.saving.async_writer", _WAITS, told=True)
SERIALIZE_FILE = _function(
    "safetensors.torch",
    "serialize_file",
    "tensor_dict, filename, metadata",
    "training.saving.async_writer training.trainer.model_files",
    _WAITS,
    told=True,
)
FLATTEN = _function(
    "safetensors.torch",
    "_flatten_as_ptr",
    "tensors, keep_alive_buffer",
    "training.trainer.own_state",
    "a checkpoint contains weights twice: in Trainer's file and in hf_spot's",
    told=True,
)
TENSOR_SPEC = _name(
    "class",
    "safetensors.torch",
    "TensorSpec",
    "*, dtype, shape, data_ptr, data_len",
    "training.saving.async_writer training.trainer.model_files",
    _WAITS,
    told=True,
)
SAFE_OPEN = _name(
    "class",
    "safetensors",
    "safe_open",
    "…",
    "training.saving.unwritten",
    "a script that reads weights right after its own save may not find them",
)
TYPES = _value("safetensors.torch", "_TYPES", "training.saving.async_writer", _WAITS, told=True)
TO_NDARRAY = _function(
    "safetensors.torch",
    "_to_ndarray",
    "tensor",
    "training.saving.device",
    "training waits until weights are copied from the GPU",
    told=True,
    only="GPUs",
)
STORAGE_CPU = _method(
    "torch:UntypedStorage",
    "cpu",
    "",
    "training.saving.device",
    "training waits until the optimizer's state is copied from the GPU",
    told=True,
    only="GPUs",
)
COMPILATIONS = _value(
    "torch._dynamo.callback",
    "callback_handler",
    "training.session.phases",
    "a compilation of more than an hour counts as a hang",
    told=True,
    scope=_BOTH,
    optional=True,
)
SAVE_TOGETHER = _function(
    _TOGETHER,
    "save",
    "state_dict, *, storage_writer, planner, process_group",
    "training.saving.async_writer training.trainer.saves",
    _SHARDS_WAIT,
    **_FSDP,
)
SAVE_ALONE = _function(
    _TOGETHER,
    "save",
    "*, no_dist, …",
    "training.saving.async_writer",
    "with FSDP on one GPU training waits until a checkpoint is written",
    **_FSDP,
)
SET_UP_PLANNER = _method(
    _PLANNER, "set_up_planner", "state_dict, storage_meta, is_coordinator", "training.saving.shards", _SHARDS_WAIT, **_FSDP
)
LOCAL_PLAN = _method(_PLANNER, "create_local_plan", "", "training.saving.shards", _SHARDS_WAIT, **_FSDP)
GLOBAL_PLAN = _method(_PLANNER, "create_global_plan", "all_plans", "training.saving.shards", _SHARDS_WAIT, **_FSDP)
FINISH_PLAN = _method(_PLANNER, "finish_plan", "new_plan", "training.saving.shards", _SHARDS_WAIT, **_FSDP)
RESOLVE_DATA = _method(_PLANNER, "resolve_data", "write_item", "training.saving.shards", _SHARDS_WAIT, **_FSDP)
STORAGE_META = _method(
    _TOGETHER + ".filesystem:FileSystemWriter", "storage_meta", "", "training.saving.shards", _SHARDS_WAIT, **_FSDP
)
READ_SHARDS = _method(
    _TOGETHER + ".filesystem:FileSystemReader",
    "read_data",
    "plan, planner",
    "training.saving.shard_loads",
    _WHOLE_SHARDS,
    **_FSDP,
)
SHARD_PLACES = _attribute(
    _TOGETHER + ".filesystem:FileSystemReader", "storage_data", "training.saving.shard_loads", _WHOLE_SHARDS, **_FSDP
)
FAILURES = _attribute(
    _TOGETHER + ".api:CheckpointException",
    "failures",
    "training.saving.async_writer",
    "an error of a rank that can't write is reported less clearly",
    **_FSDP,
)

CHECKPOINT_ENGINE = _attribute(
    "deepspeed.runtime.engine:DeepSpeedEngine",
    "checkpoint_engine",
    "training.trainer.engines",
    "files that DeepSpeed writes itself may be committed before they are complete",
    only="DeepSpeed",
)

# Loaders: positions in the data
_PLACE = "a resumed loop gets other batches than an uninterrupted one"
_ACCELERATE: Any = {"scope": Scope.LOOP, "optional": True}
_WORKERS = "a signal to the whole job kills DataLoader workers, and so the training before it can save"
ITERATE = _method(_LOADER, "__iter__", "", "training.data.loaders", _PLACE, scope=Scope.LOOP)
ITERATOR = _attribute(
    _LOADER,
    "_iterator",
    "training.data.evaluation_workers training.data.iterations training.data.stream_position",
    _PLACE,
    scope=_BOTH,
)
INDEX_SAMPLER = _attribute(
    "torch.utils.data.dataloader:_BaseDataLoaderIter", "_index_sampler", "training.data.iterations", _PLACE, scope=Scope.LOOP
)
START_WORKERS = _method(
    "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter",
    "__init__",
    "loader",
    "training.data.worker_processes",
    _WORKERS,
    scope=_BOTH,
)
WORKER_LOOP = _function(
    "torch.utils.data._utils.worker",
    "_worker_loop",
    "dataset_kind, dataset, index_queue, data_queue, done_event, auto_collation, collate_fn, drop_last, base_seed, init_fn, "
    "worker_id, …",
    "training.data.worker_processes",
    f"{_WORKERS}; random numbers in workers differ after a resume",
    scope=_BOTH,
)
SHARD = _name("class", "accelerate.data_loader", "DataLoaderShard", "…", "training.data.loaders", _PLACE, **_ACCELERATE)
DISPATCHER = _name(
    "class",
    "accelerate.data_loader",
    "DataLoaderDispatcher",
    "…",
    "training.data.loaders training.data.iterations",
    _PLACE,
    **_ACCELERATE,
)
ITERATE_SHARD = _method(_SHARD, "__iter__", "", "training.data.loaders", _PLACE, **_ACCELERATE)
ITERATE_DISPATCHER = _method(_DISPATCHER, "__iter__", "", "training.data.loaders", _PLACE, **_ACCELERATE)
ITERATION = _attribute(_SHARD, "iteration", "training.data.iterations", _PLACE, **_ACCELERATE)
ITERATION_OF_DISPATCHER = _attribute(_DISPATCHER, "iteration", "training.data.iterations", _PLACE, **_ACCELERATE)
INSIDE = _attribute(
    _ADAPTER,
    "base_dataloader",
    "training.data.loaders training.data.iterations training.trainer.random_states training.trainer.streams "
    "training.trainer.exact_steps training.trainer.exact_metrics",
    _PLACE,
    scope=_BOTH,
    optional=True,
)
SHARD_GENERATOR = _attribute(_SHARD, "synchronized_generator", "training.data.iterations", _PLACE, **_ACCELERATE)
SPLIT_BATCHES = _attribute(
    _DISPATCHER,
    "split_batches",
    "training.data.iterations training.trainer.random_states training.trainer.resume_fixes training.trainer.streams",
    _PLACE,
    scope=_BOTH,
    optional=True,
)
_COMPLETED = "the last batch of a resumed pass is completed with other samples, if one rank reads the batches of all"
SLICE = _attribute(_DISPATCHER, "slice_fn", "training.data.first_batch", _COMPLETED, scope=_BOTH, optional=True)
DROP_LAST = _attribute(_DISPATCHER, "_drop_last", "training.data.first_batch", _COMPLETED, scope=_BOTH, optional=True)
STATEFUL = _attribute(_ADAPTER, "use_stateful_dataloader", "training.data.loaders", _PLACE, **_ACCELERATE)
SKIPS_INSIDE = _attribute(
    "accelerate.data_loader:SkipBatchSampler",
    "batch_sampler",
    "training.trainer.resume_fixes training.data.worker_processes",
    "a resumed epoch has another order than it began with",
    optional=True,
)
SKIPS = _attribute(
    _DISPATCHER, "skip_batches", "training.trainer.resume_fixes", "a resumed training sees samples twice", optional=True
)
PREPARED_MODELS = _attribute(
    "accelerate.accelerator:Accelerator",
    "_models",
    "training.trainer.restore training.loop.loop_states",
    "evaluations after a finished training report how long its model took to prepare, and a loop's models are not described",
    told=True,
    scope=_BOTH,
    optional=True,
)
OPTIMIZERS = _attribute(
    "accelerate.accelerator:Accelerator",
    "_optimizers",
    "training.manager training.loop.loop_states",
    "hf-spot launch shows only steps that were saved, and checkpoints are not checked for NaN",
    told=True,
    **_ACCELERATE,
)
SCHEDULERS = _attribute(
    "accelerate.accelerator:Accelerator",
    "_schedulers",
    "training.loop.loop_states",
    "a scheduler that was not prepared is taken for one that was",
    told=True,
    **_ACCELERATE,
)
REGISTERED = _attribute(
    "accelerate.accelerator:Accelerator",
    "_custom_objects",
    "training.loop.loop_states",
    "objects that are registered with an accelerator are named as in no checkpoint",
    told=True,
    **_ACCELERATE,
)
BACKWARD = _method(
    "torch:Tensor",
    "backward",
    "…",
    "training.loop.loop_steps",
    "the losses of a custom loop's steps that are done again after a kill are not compared with those of before",
    told=True,
    scope=Scope.LOOP,
)
ORIGINAL_MODULE = _attribute(
    "torch._dynamo.eval_frame:OptimizedModule",
    "_orig_mod",
    "training.loop.loop_states",
    "a checkpoint of a compiled model has names that the plain model lacks",
    **_ACCELERATE,
)
AGENT_HANDLER = _function(
    "torch.distributed.elastic.multiprocessing.api",
    "_terminate_process_handler",
    "…",
    "training.session.notebook",
    "in workers of notebook_launcher a notice ends the training in the middle of a step",
    optional=True,
)
NUMPY_RANDOM = _value(
    "numpy.random.mtrand",
    "_rand",
    "training.data.rng",
    "each step reads numpy's random state again (about 20 microseconds)",
    told=True,
    scope=_BOTH,
)
NUMPY_BITS = _value(
    "numpy.random.mtrand:RandomState",
    "_bit_generator",
    "training.data.rng",
    "each step reads numpy's random state again (about 20 microseconds)",
    told=True,
    scope=_BOTH,
)

# Streams of datasets
_READ_AGAIN = "a resumed stream with a shuffle buffer is read again from its start"
_STREAM: Any = {"told": True, "scope": _BOTH, "optional": True}
_BUFFER, _BUFFERS = "datasets.iterable_dataset:BufferShuffledExamplesIterable", "training.data.shuffle_buffers"
ITERATE_BUFFER = _method(_BUFFER, "__iter__", "", _BUFFERS, _READ_AGAIN, **_STREAM)
ARROW_OF_BUFFER = _value(_BUFFER, "iter_arrow", _BUFFERS, _READ_AGAIN, **_STREAM)
BEGIN_STATE_OF_BUFFER = _method(_BUFFER, "_init_state_dict", "", _BUFFERS, _READ_AGAIN, **_STREAM)
LOAD_STATE_OF_BUFFER = _method(_BUFFER, "load_state_dict", "state_dict", _BUFFERS, _READ_AGAIN, **_STREAM)
STATE_OF_STREAM = _method("datasets.iterable_dataset:IterableDataset", "state_dict", "", _BUFFERS, _READ_AGAIN, **_STREAM)
LOAD_STATE_OF_STREAM = _method(
    "datasets.iterable_dataset:IterableDataset", "load_state_dict", "state_dict", _BUFFERS, _READ_AGAIN, **_STREAM
)
START_OF_STREAM = _attribute(
    "datasets.iterable_dataset:IterableDataset", "_starting_state_dict", _BUFFERS, _READ_AGAIN, **_STREAM
)

PREPARE_STREAM = _method(
    "datasets.iterable_dataset:IterableDataset",
    "_prepare_ex_iterable_for_iteration",
    "…",
    "training.data.stream_position",
    "a stream is read again from its start",
    **_STREAM,
)
PIN_MEMORY = _function(
    "torch.utils.data._utils.pin_memory",
    "pin_memory",
    "data, device",
    "training.data.stream_position",
    "a stream's workers can't give batches in pinned memory",
    told=True,
    scope=_BOTH,
)
STREAM_SHARD = _name(
    "class",
    "accelerate.data_loader",
    "IterableDatasetShard",
    "dataset, …",
    "training.data.stream_position",
    "a stream that several ranks divide is read again from its start",
    **_STREAM,
)

# Stores: only those in use (they cope with a missing name themselves)
_COPIES = "downloads from S3 copy each block two more times"
_DATA: Any = {"scope": _BOTH, "optional": True}
S3_BODY = _attribute("botocore.response:StreamingBody", "_raw_stream", "storage.s3_parts", _COPIES, told=True, **_DATA)
S3_ANSWER = _attribute("urllib3.response:HTTPResponse", "_fp", "storage.s3_parts", _COPIES, told=True, **_DATA)
S3_PROMPTER = _attribute(
    "botocore.credentials:AssumeRoleProvider",
    "_prompter",
    "storage.s3_connection",
    "a launch without a terminal waits for an MFA code that can't be entered",
    told=True,
    **_DATA,
)
_DEAD = "a dead connection to S3 is detected after 30 s instead of 5"
S3_ENDPOINT = _attribute("botocore.client:BaseClient", "_endpoint", "storage.s3_connection", _DEAD, told=True, **_DATA)
S3_SESSION = _attribute("botocore.endpoint:Endpoint", "http_session", "storage.s3_connection", _DEAD, told=True, **_DATA)
XET_SESSION = _name(
    "class",
    "hf_xet",
    "XetSession",
    "",
    "storage.hub_connection",
    "files can't be transferred to or from the Hugging Face Hub",
    **_DATA,
)
XET_UPLOAD = _method(
    "hf_xet:XetSession",
    "new_upload_commit",
    "…",
    "storage.hub_connection",
    "files can't be uploaded to the Hugging Face Hub",
    **_DATA,
)
XET_DOWNLOAD = _method(
    "hf_xet:XetSession",
    "new_download_stream_group",
    "…",
    "storage.hub_connection",
    "files can't be downloaded from the Hugging Face Hub",
    **_DATA,
)
GCS_HTTP = _attribute(
    "google.cloud.storage.client:Client",
    "_http",
    "storage.gcs",
    "files can't be transferred to or from Google Cloud Storage",
    **_DATA,
)
BARS = _attribute("tqdm.std:tqdm", "_instances", "log", "log lines start on the line of a progress bar", told=True, **_DATA)

# hf-spot launch
_LAUNCHES = "hf-spot launch can't read the options of accelerate launch"
_LAUNCH: Any = {"scope": Scope.LAUNCH}
VALIDATE_LAUNCH = _function(
    "accelerate.commands.launch", "_validate_launch_command", "args", "launch.options", _LAUNCHES, **_LAUNCH
)
LAUNCH_PARSER = _function("accelerate.commands.launch", "launch_command_parser", "", "launch.options", _LAUNCHES, **_LAUNCH)
LAUNCH_ENVIRONMENT = _function(
    "accelerate.utils.launch", "prepare_simple_launcher_cmd_env", "args", "launch.options", _LAUNCHES, **_LAUNCH
)
OPTIONS_PARSER = _name("class", "accelerate.commands.utils", "CustomArgumentParser", "", "launch.options", _LAUNCHES, **_LAUNCH)
_COLD = "after a crash of several ranks, each imports everything again"
RUN_RANKS = _function("torch.distributed.run", "run", "args", "launch.warm_ranks", _COLD, told=True, optional=True, **_LAUNCH)
START_CHILD = _method(
    "subprocess:Popen",
    "_execute_child",
    "args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread, p2cwrite, "
    "c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session, …",
    "launch.warm_ranks",
    _COLD,
    told=True,
    **_LAUNCH,
)

TABLE: tuple[Name, ...] = tuple(one for one in globals().values() if isinstance(one, Name))

# -- the check ------------------------------------------------------------------------------------------------------------


def check(scope: Scope, trainer: Any = None) -> None:
    """Check that the names that a training needs exist and accept hf_spot's parameters; warn in one line about minor losses.

    Args:
        scope: what is about to begin.
        trainer: the Trainer, if there is one.

    Raises:
        ConfigError: a promise depends on a name that is missing or has changed.
    """
    needed = [one for one in TABLE if one.scope & scope and (not one.only or (trainer is not None and ONLY[one.only](trainer)))]
    troubled = [(one, trouble) for one in needed if (trouble := one.trouble()) is not None]
    refused = [(one, trouble) for one, trouble in troubled if one.refused]
    if refused:
        raise ConfigError(_in_words(refused), hint=how_to_install({one.library for one, _ in refused}))
    if scope is not Scope.LAUNCH:  # no training runs in the launcher's process
        tell_untested()
    if troubled:
        warn_for_all("%s. To fix this: %s", _in_words(troubled), how_to_install({one.library for one, _ in troubled}))


def _in_words(troubled: Iterable[tuple[Name, str]]) -> str:
    by_loss: dict[tuple[str, str], dict[str, None]] = {}
    for one, trouble in troubled:
        by_loss.setdefault((one.without, one.library), {})[trouble] = None
    return "; ".join(
        f"{library} {version_of(library)} {' and '.join(troubles)}: {without}"
        for (without, library), troubles in by_loss.items()
    )
