"""What the ranks of a pipeline tell each other: a kind, facts that JSON has, and bytes. Reading runs nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HEAD = struct.Struct("<Q")


@dataclass(frozen=True)
class Message:
    """One message.

    From a stage: `hello`, `claim` (systems to work on), `deliver` (done with the stage), `give_back` (not done), `save` (on
    their way), `alive`, `tick`, `failed`, `left`. From the books: `systems`, `assign` (another stage), `taken` (delivery is in
    the ledger), `go`, `end`, `stop`. A channel itself tells `closed`.
    """

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    blobs: Sequence[bytes] = ()


def encode(message: Message) -> bytes:
    """A message as bytes."""
    head = json.dumps([message.kind, dict(message.facts), [len(one) for one in message.blobs]]).encode()
    return b"".join([HEAD.pack(len(head)), head, *message.blobs])


def decode(data: bytes) -> Message:
    """The inverse of `encode`."""
    end = HEAD.size + HEAD.unpack_from(data)[0]
    kind, facts, lengths = json.loads(data[HEAD.size : end])
    blobs = []
    for length in lengths:
        blobs.append(data[end : end + length])
        end += length
    return Message(kind, facts, blobs)
