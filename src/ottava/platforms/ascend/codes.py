"""Every number that torch_npu can put behind `error code is`, and what it calls for.

The numbers are those of the table in torch_npu 2.13.0 (`NPUErrorCodes.h`: ACL's and, from 1 to 24, HCCL's), and two
that its documentation adds (507054, 107020); tests/npu/test_codes.py holds this table against the wheel's. What a
number calls for is this project's reading of what it says: none was seen on a chip.
"""

from __future__ import annotations

import re

from ottava.platforms.base import FaultClass

ACL: dict[FaultClass, tuple[int, ...]] = {
    FaultClass.TRANSIENT: (
        107019, 207014, 500005,
        507002, 507004, 507005, 507006, 507011,  # the stream or its queue is not as far as was thought
        507014, 507015, 507017, 507018, 507023, 507034, 507035, 507048,  # a kernel ran too long, or failed
    ),
    FaultClass.DEVICE_STUCK: (
        207002, 207007, 207008, 207009, 207010, 207011, 207012,  # out of events, streams: a new context has them
        500000, 500001, 500002, 500003, 507000, 507001, 507007, 507012,
        507019, 507020, 507021, 507025, 507026, 507037, 507049, 507050, 507051, 507052, 507900,
    ),
    FaultClass.DEVICE_LOST: (
        207004, 500004, 507010, 507013, 507033, 507054, 507899, 507901,  # heartbeat, DMA, memory errors, driver, link
    ),
    FaultClass.UNUSABLE: (
        100024, 100025, 100026, 100028, 100029, 148050, 507027,  # no such operator, type or kernel in this CANN
        100039, 148049, 200001, 200006, 207000, 207006, 507008, 507009, 507038, 507039, 507040, 507041,
    ),
    FaultClass.OUT_OF_MEMORY: (200000, 207001, 207005, 207018, 300000),
    FaultClass.COLLECTIVE: (107020, 507022, 507046, 507047),  # waiting for a stream or an event: a peer is not coming
    FaultClass.NUMERIC: (207003,),
    FaultClass.BUG: (
        *range(100000, 100024), 100027, *range(100030, 100039), *range(100040, 100046),
        148046, 148047, 148048, 148051, 148052,
        200002, 200003, 200004, 200005, 200007, *range(107000, 107019), 207013, 207015,
        507003, 507016, 507024, 507028, 507029, 507030, 507031, 507032,
        507036, 507042, 507043, 507044, 507045,  # a kernel read or wrote where nothing is
    ),
}  # fmt: skip

HCCL: dict[FaultClass, tuple[int, ...]] = {
    FaultClass.COLLECTIVE: (4, 8, 9, 11, 12, 13, 14, 19, 21, 22, 23),
    FaultClass.TRANSIENT: (7, 17, 20),
    FaultClass.OUT_OF_MEMORY: (3, 24),
    FaultClass.DEVICE_STUCK: (15, 18),
    FaultClass.DEVICE_LOST: (16,),
    FaultClass.UNUSABLE: (5, 10),  # not supported; a file of its configuration that is not there
    FaultClass.BUG: (1, 2, 6),
}

OUTSIDE = (107020, 507054)
"""Numbers that are not in the wheel's table."""

TABLE: dict[int, FaultClass] = {n: fault for table in (ACL, HCCL) for fault, them in table.items() for n in them}
_ITS_OWN = re.compile("hccl|npu", re.IGNORECASE)
_OF_HCCL = frozenset(number for them in HCCL.values() for number in them)

_SAID = re.compile(r"(?:error|ret(?:urn)?) ?code(?: is|:|=)? ?(\d{1,6})\b|\b([125]07\d{3})\b", re.IGNORECASE)
_PASSING = re.compile(
    r"\[ERROR\] \d{4}-[\d:.-]+ |\(PID: ?\d+, ?|RankID: ?-?\d+\) ?|^\[W?\d+ [^\]]*\] ?|0x[0-9a-f]+", re.IGNORECASE
)


def number(text: str) -> int | None:
    """The first number of the table in an error's text: after `error code is`, or one of the runtime's own (x07xxx).

    HCCL's numbers are those of many things, such as curl: they count where the text speaks of HCCL or the NPU.
    """
    said = (int(match[1] or match[2]) for match in _SAID.finditer(text))
    known = TABLE if _ITS_OWN.search(text) else TABLE.keys() - _OF_HCCL
    return next((found for found in said if found in known), None)


def words(text: str) -> str:
    """An error's text in one line, without what is different each time: hours, processes, addresses."""
    return " ".join(_PASSING.sub("", text).split())
