"""The dimensions: mesh, collectives, tensor-parallel layers, pipeline, gradients."""
