"""Names the files that emscan does not load, so that a refusal says what the file is."""

from __future__ import annotations

from pathlib import Path

from emscan.load.source import ZIP_MAGIC, Source

READABLE = (
    "emscan reads files of torch.save, .safetensors, TorchScript, torch.export and Hugging Face folders; "
    "save the model as one of these"
)  # fmt: skip

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GGUF", "a GGUF model"),
    (0, b"ggjt", "a GGML model"),
    (0, b"lmgg", "a GGML model"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x7fELF", "an executable"),
    (0, b"MZ", "an executable"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (257, b"ustar", "a tar archive"),
)


def describe(source: Source) -> tuple[str, str]:
    """Return what a file is, with its article, and what to do about it."""
    data, head = source.data, source.data[:512]
    if not data:
        return "an empty file", "copy or save it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for", "fetch it with `git lfs pull`"
    if data.startswith(ZIP_MAGIC):
        return _describe_zip(source)
    for offset, magic, what in _MAGIC:
        if head[offset:].startswith(magic):
            return what, READABLE
    if _is_onnx(source):
        return "an ONNX model", READABLE
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page", "a download may have failed: fetch the file again"
    if text.startswith((b"{", b"[")) and _is_text(head):
        return "a JSON document", READABLE
    if _is_text(head):
        return "plain text", READABLE
    return "of no format that emscan knows", READABLE


def describe_folder(path: Path) -> str:
    """Return what a folder looks like."""
    if (path / "saved_model.pb").exists():
        return "it is a TensorFlow SavedModel"
    return "it is a folder"


def _describe_zip(source: Source) -> tuple[str, str]:
    if source.names is None:
        return "a zip archive that is cut short or damaged", "copy or save it again"
    if source.names and all(name.endswith(".npy") for name in source.names):
        return "a NumPy archive of arrays", "pass arrays with --probe; " + READABLE
    if any(name.endswith((".keras", "model.weights.h5")) for name in source.names):
        return "a Keras model", READABLE
    return "a zip archive that holds no model", READABLE


def _is_onnx(source: Source) -> bool:
    """Whether the file starts like ONNX's protobuf: its IR version, then the name of the producer."""
    head = source.data[:64]
    return source.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12" and head[1] < 32)


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode("utf-8")
        if len(head) - error.start > 3:  # more than a character cut in two
            return False
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)
