"""Checkpoints changed by somebody who knows how the checksum is made."""

import hashlib
import json

import safetensors.torch
import torch


def rewrite(path, change):
    """Change metadata and tensors, and renew the checksum unless `honest` is set."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    if metadata.pop("honest", None) is None and "sha256" in metadata:
        digest = hashlib.sha256(metadata["document"].encode())
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        metadata["sha256"] = digest.hexdigest()
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def edit_document(path, edit):
    """Let `edit` change the document in place, or return another one."""

    def change(metadata, tensors):
        document = json.loads(metadata["document"])
        changed = edit(document)
        metadata["document"] = json.dumps(document if changed is None else changed)

    rewrite(path, change)


def change_document(path, **changes):
    """Set entries of the document; None removes one."""

    def edit(document):
        for name, value in changes.items():
            if value is None:
                del document[name]
            else:
                document[name] = value

    edit_document(path, edit)
