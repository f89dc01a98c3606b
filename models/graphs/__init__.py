"""Models that come as a graph: ONNX files and programs of `torch.export`."""
