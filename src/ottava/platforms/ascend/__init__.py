"""What is known of Ascend chips and their software: data, and checks that need neither. Used by `npu` and `doctor`."""
