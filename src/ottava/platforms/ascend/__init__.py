"""What is known of Ascend chips and their software, as data and as checks that need neither: used by `npu` and `doctor`."""
