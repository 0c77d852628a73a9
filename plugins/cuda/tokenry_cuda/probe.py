"""Is an NVIDIA GPU here, which, and can it be used? From NVML through ctypes: no torch, no context
on the device, nothing is written.

In: a root directory (`/`, or a tree that a test made), the environment, the name of the library.
Out: `DeviceRef` or None. Names and codes are those of NVML's API reference (docs.nvidia.com/deploy,
nvml.h); its functions with a version suffix are stable since driver 450.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenry.backend.contract import DeviceRef

VISIBLE = "CUDA_VISIBLE_DEVICES"
LEAST_CUDA = 12040
"""CUDA of the driver, as 1000 * major + 10 * minor: what torch's oldest builds here (cu126) run on
by CUDA's compatibility within a major release, with Triton's own assembler.
"""
LEAST_SM = 75
"""Compute capability 7.5: torch's CUDA 12.8 builds and Triton have nothing older."""
SUCCESS, UNINITIALIZED, NO_PERMISSION, NOT_LOADED, LIB_MISMATCH, LOST = 0, 1, 4, 9, 18, 15
REASONS = {
    NO_PERMISSION: "the driver refuses access (NVML 4): the process or container lacks /dev/nvidia*"
    "; docker run --gpus all, or the device's group",
    NOT_LOADED: "the kernel module is not loaded (NVML 9); sudo modprobe nvidia",
    LIB_MISMATCH: "library and kernel module are of different drivers (NVML 18), as after an "
    "update; reboot, or reload the nvidia module",
    LOST: "the GPU has fallen off the bus (NVML 15); dmesg has the Xid, reset or reboot",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU as NVML shows it. sm: 10 * major + minor. mig: it is cut into slices."""

    name: str
    uuid: str
    sm: int
    mig: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the library said. cuda: of the driver, see LEAST_CUDA."""

    driver: str
    cuda: int
    cards: tuple[Card, ...]


class NvmlError(Exception):
    """A call failed with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(REASONS.get(code, f"NVML says {code}; nvidia-smi tells more"))


def find_device(root: Path, environ: Mapping[str, str], library: str) -> DeviceRef | None:
    """None without a sign of a GPU; score 0, with the reason and its mend, for what cannot be
    used.
    """

    def unusable(why: str, name: str = "NVIDIA GPU") -> DeviceRef:
        return DeviceRef(backend="cuda", index=0, name=name, score=0, why=why)

    nodes = sorted(root.glob("dev/nvidia[0-9]*")) or sorted(root.glob("dev/dxg"))
    try:
        found = ask(library)
    except OSError:
        if not nodes:
            return _without_driver(root)
        return unusable(
            f"{nodes[0].name} is in /dev, but {library} is not to be found: no driver, or a "
            "container without it; install the driver, or docker run --gpus all"
        )
    except NvmlError as error:
        return unusable(str(error))
    if not found.cards:
        return unusable(f"driver {found.driver} shows no GPU; docker run --gpus all, or see dmesg")
    seen = visible(found.cards, environ.get(VISIBLE))
    if isinstance(seen, str):
        return unusable(seen, found.cards[0].name)
    first = seen[0]
    if found.cuda < LEAST_CUDA:
        return unusable(
            f"driver {found.driver} has CUDA {_version(found.cuda)}, too old: at least "
            f"{_version(LEAST_CUDA)} (driver 550); update the driver",
            first.name,
        )
    if first.sm < LEAST_SM:
        return unusable(
            f"compute capability {first.sm // 10}.{first.sm % 10} is not supported, 7.5 (Turing) "
            f"is the oldest; another card with {VISIBLE}, or --backend cpu",
            first.name,
        )
    slices = ", a MIG slice" if environ.get(VISIBLE, "").startswith("MIG-") else ""
    if first.mig and not slices:
        return unusable(
            f"MIG is on and no slice was chosen; {VISIBLE}=MIG-... (`nvidia-smi -L` lists them)",
            first.name,
        )
    what = f"{len(seen)} visible, sm_{first.sm}, driver {found.driver}{slices}"
    return DeviceRef(backend="cuda", index=0, name=first.name, score=100, why=what)


def _without_driver(root: Path) -> DeviceRef | None:
    """A card on the bus that no driver serves, or nothing. PCI vendor 0x10de, class 03xx."""
    for device in sorted(root.glob("sys/bus/pci/devices/*")):
        try:
            vendor = (device / "vendor").read_text("ascii").strip()
            kind = (device / "class").read_text("ascii").strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            why = f"the card at {device.name} has no driver; install NVIDIA's driver 550 or later"
            return DeviceRef(backend="cuda", index=0, name="NVIDIA GPU", score=0, why=why)
    return None


def visible(cards: tuple[Card, ...], chosen: str | None) -> tuple[Card, ...] | str:
    """The cards that the process may use, in its order, or why there is none.

    CUDA C Programming Guide, CUDA_VISIBLE_DEVICES: numbers or UUIDs (a beginning is enough), the
    list ends at the first that is none.
    """
    if chosen is None:
        return cards
    if not chosen.strip():
        return f"{VISIBLE} is empty: every GPU is hidden; unset {VISIBLE}"
    found: list[Card] = []
    for part in (p.strip() for p in chosen.split(",")):
        if part.startswith("MIG-"):
            mig = [card for card in cards if card.mig]
            return tuple(mig) if mig else f"{VISIBLE}={chosen}, but MIG is off; unset {VISIBLE}"
        named = [c for c in cards if part and c.uuid.startswith(part)]
        if part.isdecimal():
            named = [cards[int(part)]] if int(part) < len(cards) else []
        if len(named) != 1 or named[0] in found:
            break
        found.append(named[0])
    if found:
        return tuple(found)
    return f"{VISIBLE}={chosen} hides all {len(cards)} GPUs; unset {VISIBLE}, or 0"


def ask(library: str) -> Found:
    """All that is wanted of NVML. Raises OSError where there is no library, NvmlError where a call
    fails.
    """
    nvml = ctypes.CDLL(library)
    with _session(nvml):
        driver = ctypes.create_string_buffer(80)
        _check(nvml.nvmlSystemGetDriverVersion(driver, 80))
        cuda, count = ctypes.c_int(), ctypes.c_uint()
        _check(nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda)))
        _check(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        cards = tuple(_card(nvml, i) for i in range(count.value))
        return Found(driver=driver.value.decode(), cuda=cuda.value, cards=cards)


@contextmanager
def _session(nvml: ctypes.CDLL) -> Iterator[None]:
    _check(nvml.nvmlInit_v2())
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _card(nvml: ctypes.CDLL, index: int) -> Card:
    handle = ctypes.c_void_p()
    _check(nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)))
    name, uuid = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvml.nvmlDeviceGetName(handle, name, 96))
    _check(nvml.nvmlDeviceGetUUID(handle, uuid, 96))
    _check(
        nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    now, pending = ctypes.c_uint(0), ctypes.c_uint(0)
    # cards without MIG answer NOT_SUPPORTED, which leaves the 0
    nvml.nvmlDeviceGetMigMode(handle, ctypes.byref(now), ctypes.byref(pending))
    return Card(
        name=name.value.decode(),
        uuid=uuid.value.decode(),
        sm=10 * major.value + minor.value,
        mig=now.value == 1,
    )


def _check(code: int) -> None:
    if code != SUCCESS:
        raise NvmlError(code)


def _version(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"
