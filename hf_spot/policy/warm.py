"""When to keep warm spares, and which of them may be used. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from hf_spot.errors import ConfigError

AUTO, ON, OFF = "auto", "on", "off"
RANK_BYTES = 500 * 10**6  # torch, transformers and accelerate, without the pages that processes share
_LEFT_FOR_OTHERS = 0.15  # of the memory
_NICE = 19
_AFTER_FIRST_STEP_S = 15.0  # a short training ends sooner, and a script that crashes at its beginning needs no spare
_IDLE_S = 3.0  # machines that are there already meet sooner

# Set anew for each launch, by hf-spot, accelerate or torchrun, and read when a process group begins: after the imports.
_OF_A_LAUNCH = frozenset(
    {
        "ACCELERATE_USE_CPU",  # accelerate says so to a process that is alone
        "GLOO_SOCKET_IFNAME",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "RANK",
        "ROLE_NAME",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "WORLD_SIZE",
    }
)
_OF_TORCHRUN = "TORCHELASTIC_"
_OF_ONE_OF_SEVERAL = frozenset({"LOCAL_RANK", "LOCAL_WORLD_SIZE"})  # as those above, but a process that is alone has none
# Functions that imports call, by module, which go through all variables for others than those of a launch: for names that begin
# with TQDM_ and FSSPEC, or end with _proxy.
_LOOK_FOR_OTHERS = frozenset(
    {("tqdm.utils", "envwrap"), ("fsspec.config", "set_conf_env"), ("urllib.request", "getproxies_environment")}
)
# Read by hf-spot alone, and by torchrun's agent when it begins.
_OF_HF_SPOT = frozenset(
    {
        "HF_SPOT_CLAIMED_AT",
        "HF_SPOT_FULL_RANKS",
        "HF_SPOT_LAUNCH",
        "HF_SPOT_RUNTIME_DIR",
        "PET_LOG_DIR",
    }
)


def check(mode: str) -> str:
    """Return the value of ``--warm-spares``. Raises ConfigError."""
    if mode not in (AUTO, ON, OFF):
        raise ConfigError(f"--warm-spares {mode}: must be auto, on or off", hint="--warm-spares auto")
    return mode


def wait_s(mode: str, *, is_idle: bool) -> float:
    """Return the seconds after the first step of a launch, or from the beginning of a wait, at which spares are started.

    Args:
        mode: as in `check`.
        is_idle: this machine only waits for others.
    """
    return 0.0 if mode == ON else _IDLE_S if is_idle else _AFTER_FIRST_STEP_S


def nice(mode: str) -> int:
    """Return the priority of the imports, as of the command ``nice``."""
    return 0 if mode == ON else _NICE


def has_room(mode: str, ranks: int, available_bytes: int, total_bytes: int, *, are_there: bool = False) -> bool:
    """Return whether there is memory for the spares of so many ranks.

    Args:
        mode: as in `check`. With ``on`` there always is.
        ranks: of this machine.
        available_bytes: memory that may still be allocated on this machine, or in this container.
        total_bytes: memory of either.
        are_there: the spares have been started, and are to go when little is left.
    """
    needed = 0 if are_there else (ranks + 1) * RANK_BYTES
    left = _LEFT_FOR_OTHERS * total_bytes * (0.5 if are_there else 1.0)
    return mode == ON or available_bytes - needed >= left


def differing(before: Mapping[str, str], now: Mapping[str, str], read: Collection[str]) -> list[str]:
    """Return the variables because of which a spare is not what a fresh Python would be.

    Args:
        before: the environment that it was started with.
        now: the one that it would have to go on with.
        read: names that its imports have read.
    """
    changed = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    changed -= {name for name in _OF_ONE_OF_SEVERAL if name not in now and name not in read}
    free = {name for name in changed if is_of_launch(name) and name not in _OF_ONE_OF_SEVERAL and name not in read}
    return sorted(changed - _OF_HF_SPOT - free)


def is_of_launch(name: str) -> bool:
    """Return whether a variable is set anew for each launch, and only read when a process group begins."""
    return name in _OF_A_LAUNCH or name in _OF_ONE_OF_SEVERAL or name.startswith(_OF_TORCHRUN)


def looks_for_others(module: str, function: str) -> bool:
    """Return whether a function that goes through all variables makes no use of those of a launch."""
    return (module, function) in _LOOK_FOR_OTHERS


def same_command(before: Sequence[str], now: Sequence[str]) -> bool:
    """Return whether a Python with one command line does what it would do with the other: torchrun adds ``-u``, so that output
    is not held back, and accelerate starts a process that is alone without it."""
    return _without_u(before) == _without_u(now)


def _without_u(argv: Sequence[str]) -> list[str]:
    return [word for place, word in enumerate(argv) if (place, word) != (1, "-u")]
