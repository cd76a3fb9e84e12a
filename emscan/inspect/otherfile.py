"""Plain pickles, and models of other tools that emscan knows by sight."""

from __future__ import annotations

from typing import Any

from emscan.inspect.lenient import LenientMachine
from emscan.inspect.names import pickle_info
from emscan.inspect.part import Part
from emscan.inspect.reader import MOST, Reader
from emscan.inspect.root import read_root
from emscan.inspect.walk import walk
from emscan.load.calls import HINT, Instance
from emscan.load.imports import imports
from emscan.load.source import RefusalError, UnsafeError, listing

# What `emscan.load.foreign` calls a model -> the name of its format.
FOREIGN = {
    "a GGUF model": "gguf", "a GGML model": "ggml", "an ONNX model": "onnx", "an HDF5 file (Keras)": "hdf5",
    "a Keras model": "keras", "a TensorFlow Lite model": "tflite", "a TensorRT engine": "tensorrt",
    "an ExecuTorch program": "executorch", "a Flax checkpoint": "flax", "a TensorFlow graph": "tensorflow",
    "a Core ML model": "coreml", "a PaddlePaddle model": "paddle", "an NCNN model": "ncnn",
}  # fmt: skip


def read_pickle(file: Reader, _name: str, imported: tuple[list[str], bool] | None = None) -> Part:
    """Return what a pickle that torch.save did not write would import, and what it holds as far as symbols tell.

    ``imported``: its imports, and whether it runs to its end, where that is known already.
    """
    part = Part("pickle", "a pickle")
    data = file.at(0, min(file.size, MOST))
    names, whole = imported or imports(data)
    what = f"unpickling it would import {listing(names, 8)}" if names else "unpickling can run code"
    part.refusal = UnsafeError(f"it is a pickle that torch.save did not write, and {what}", HINT)
    machine: LenientMachine | None = LenientMachine(data)
    value: Any = None
    try:
        assert machine is not None
        machine.run()
        value = machine.result
    except RefusalError as error:
        machine = None
        part.notes.append(f"what it holds cannot be told: {error.reason}")
    part.pickle = pickle_info(None, machine, names, part.refusal.reason)
    if len(data) < file.size and not whole:
        part.notes.append(f"only its first {MOST:,} bytes were looked through for imports")
    root = read_root(value)
    part.metadata = {"holds": value.kind if isinstance(value, Instance) else type(value).__name__, **root.metadata}
    found = walk(value)
    part.modules = found.modules
    if machine is not None and not found.objects:
        part.refusal = RefusalError(
            "it is a pickle that holds no module and no tensors", "save a model with torch.save"
        )
    part.whole = root.module or isinstance(value, Instance)
    part.format += "-module" if part.whole else "-state-dict"
    return part


def read_foreign(file: Reader, what: str, hint: str) -> Part:
    """Return the name of a model's format that emscan does not load."""
    part = Part(FOREIGN[what], what, status="not supported")
    part.refusal = RefusalError(f"it is {what}", hint)
    if FOREIGN[what] == "gguf" and file.size >= 24:
        head = file.at(0, 24)
        version, tensors = int.from_bytes(head[4:8], "little"), int.from_bytes(head[8:16], "little")
        part.metadata = {"version": version, "tensors": tensors}
    return part
