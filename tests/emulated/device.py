"""A device "emu" for torch: an accelerator emulated on the CPU, with streams that really run beside the host.

Where there is no GPU it shows what copies from one could do wrong: device memory is nothing that the host can read, copies to
pinned memory come late, and what is read too early is not what was copied. It tells nothing of speed, or of a driver's errors.
Importing this builds it (half a minute, with a C++ compiler and ninja) and gives torch the device.

torch.emu.paused(stream)         with-block in which nothing of that stream (by default the default one) is carried out
torch.emu.set_delays(c, k)       seconds that each copy between host and device, and the result of each operator, comes late
torch.emu.copies()               (copies that the host didn't wait for, copies that it waited for)
torch.emu.pinned()               (bytes of pinned memory in use, the most that ever were, allocations so far)
torch.emu.share_generator(True)  random operators draw from the CPU's generator, as if the device had none of its own
torch.emu.host_register(address, bytes), host_unregister(address)   pins memory of one's own, as cudaHostRegister does
torch.emu.pretend_cudart()       torch.cuda.is_initialized() from now on, and torch.cuda.cudart() pins for this device
torch.emu.use_in_accelerate()    makes accelerate, and so transformers' Trainer, choose this device
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

torch.utils.rename_privateuse1_backend("emu")
_C: Any = load(
    "hf_spot_emulated_device",
    [str(Path(__file__).with_name("device.cpp"))],
    extra_cflags=["-O1", "-g0"],
    extra_ldflags=[f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_python"],
)
_module: Any = types.ModuleType("torch.emu", __doc__)


def _of(stream):
    return 0 if stream is None else stream.stream_id


@contextlib.contextmanager
def paused(stream=None):
    pause(stream)
    try:
        yield
    finally:
        resume(stream)


def pause(stream=None):
    _C.pause(_of(stream), True)


def resume(stream=None):
    _C.pause(_of(stream), False)


def set_delays(copy_s, kernel_s):
    _C.set_delays(copy_s, kernel_s)


def use_in_accelerate():
    os.environ["ACCELERATE_TORCH_DEVICE"] = "emu:0"  # read by accelerate's PartialState and transformers' TrainingArguments


class _Cudart:
    def cudaHostRegister(self, address, size, flags):
        _C.host_register(address, size)
        return 0

    def cudaHostUnregister(self, address):
        _C.host_unregister(address)
        return 0


def pretend_cudart():
    torch.cuda.is_initialized = lambda: True
    torch.cuda.cudart = _Cudart


def _generator():
    return _C.default_generator()


class device:
    def __init__(self, device):
        self.device = device

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


class Stream(torch.Stream):
    def __new__(cls, device=None, priority=0, **kwargs):
        if kwargs:
            return super().__new__(cls, **kwargs)
        return super().__new__(cls, torch.device("emu", 0))

    def wait_stream(self, other):
        torch.Stream.wait_stream(self, other)


class Event(torch.Event):
    def __new__(cls, enable_timing=False, **_):
        return super().__new__(cls, torch.device("emu"), enable_timing=enable_timing)


@contextlib.contextmanager
def stream(one):
    if one is None:
        yield
        return
    with one:
        yield


for _name, _what in {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "get_device_name": lambda _=None: "emulated",
    "is_bf16_supported": lambda *_: True,
    "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    "device": device,
    "Stream": Stream,
    "Event": Event,
    "stream": stream,
    "current_stream": lambda _=None: torch.accelerator.current_stream(),
    "default_stream": lambda _=None: torch.Stream(stream_id=0, device_index=0, device_type=20),
    "set_stream": lambda one: torch.accelerator.set_stream(one),
    "synchronize": lambda _=None: torch.accelerator.synchronize(),
    "empty_cache": lambda: None,
    "memory_allocated": lambda _=None: torch.accelerator.memory_allocated(),
    "max_memory_allocated": lambda _=None: torch.accelerator.max_memory_allocated(),
    "reset_peak_memory_stats": lambda _=None: torch.accelerator.reset_peak_memory_stats(),
    "manual_seed": lambda seed: _generator().manual_seed(int(seed)),
    "manual_seed_all": lambda seed: _generator().manual_seed(int(seed)),
    "seed": lambda: _generator().seed(),
    "seed_all": lambda: _generator().seed(),
    "initial_seed": lambda: _generator().initial_seed(),
    "get_rng_state": lambda _=None: _generator().get_state(),
    "get_rng_state_all": lambda: [_generator().get_state()],
    "set_rng_state": lambda state, _=None: _generator().set_state(state.cpu()),
    "set_rng_state_all": lambda states: [_generator().set_state(one.cpu()) for one in states] and None,
    "pause": pause,
    "resume": resume,
    "paused": paused,
    "set_delays": set_delays,
    "share_generator": _C.share_generator,
    "host_register": _C.host_register,
    "host_unregister": _C.host_unregister,
    "pretend_cudart": pretend_cudart,
    "copies": _C.copies,
    "pinned": _C.pinned,
    "use_in_accelerate": use_in_accelerate,
}.items():
    setattr(_module, _name, _what)

torch._register_device_module("emu", _module)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
sys.modules["torch.emu"] = _module
