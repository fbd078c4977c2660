// The CUDA part of resnet_fused._bindings.
#pragma once
#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_& m);
