// A piece of work that Python has had done, operator by operator, done again without Python: fastgan/train/recording.py.
#pragma once

#include <pybind11/pybind11.h>

namespace fastgan {

void bind_recording(pybind11::module_& m);

}  // namespace fastgan
