"""Data: conversations on disk, tokens with a loss mask, padding-free batches, and checks for duplicates and leaks."""

from .batches import Batch, batch_order, make_batch, micro_batches
from .checks import CheckReport, check_records, find_duplicates, find_overlap, split_records
from .conversations import Message, Record
from .encode import Example, describe_example, encode_record, encode_records
from .records import iter_records, load_records, save_records

__all__ = [
    "Batch",
    "CheckReport",
    "Example",
    "Message",
    "Record",
    "batch_order",
    "check_records",
    "describe_example",
    "encode_record",
    "encode_records",
    "find_duplicates",
    "find_overlap",
    "iter_records",
    "load_records",
    "make_batch",
    "micro_batches",
    "save_records",
    "split_records",
]
