"""Token techniques by name: pure functions of tensors and integers, one file each."""
