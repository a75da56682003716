"""Reading, converting, inspecting and directly loading checkpoints; import the submodules by name."""
