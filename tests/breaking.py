"""Ending a process, or a call, at the n-th thing it asks of the disk."""

import io
import os
import pathlib

CALLS = ("fsync", "replace", "rename", "open", "close", "link", "unlink", "mkdir")


class BreakingFile:
    """A file whose writes count, and break half-way."""

    def __init__(self, file, event):
        self.file, self.event = file, event

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        half = len(data) // 2
        self.event("write", before=lambda: (self.file.write(data[:half]), self.file.flush()))
        return self.file.write(data)

    def flush(self):
        self.event("flush")
        self.file.flush()


def break_at(patch, number, end=lambda: None):
    """Call `end` instead of the `number`-th such call, from 0; returns the names of those made."""
    calls = []

    def event(name, before=lambda: None):
        calls.append(name)
        if len(calls) == number + 1:
            before()
            end()

    def patched(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            event(name)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        patch.setattr(os, name, patched(name))
    original_open = io.open

    def open_file(file, mode="r", *args, **kwargs):
        event("open file")
        opened = original_open(file, mode, *args, **kwargs)
        return BreakingFile(opened, event) if set(mode) & set("wax+") else opened

    patch.setattr(io, "open", open_file)
    patch.setattr("builtins.open", open_file)
    accessor = getattr(pathlib, "_NormalAccessor", None)  # with functions of its own: Python 3.10
    if accessor is not None:
        patch.setattr(accessor, "open", staticmethod(open_file))
        for name in CALLS:
            if name != "open" and hasattr(accessor, name):
                patch.setattr(accessor, name, staticmethod(getattr(os, name)))
    return calls
