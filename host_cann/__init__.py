"""Host-memory CANN: with it Huawei's unmodified `torch_npu` wheel runs on a machine without an NPU. For tests only.

The libraries that the wheel links are stood in for (`src/`), written from their C interface; operators of the `npu`
device are computed by torch's CPU kernels on the same memory. So what is shown here is that memory, streams, events,
collectives and errors are handled right (level L2 of docs/ascend.md). It says nothing about Ascend's numerics: equal
bits with the CPU are equal by construction.

    python -m host_cann run -- pytest tests/npu
"""
