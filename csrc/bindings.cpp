// resnet_fused._bindings: tables.h through pybind11. resnet_fused/_bindings.py is the same for other Pythons.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unordered_set>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "tables.h"
#include "watch.h"

namespace {

namespace py = pybind11;
namespace tables = resnet_fused::tables;
using namespace resnet_fused::cpu;

py::dict dict(const tables::Row& row) {
  py::dict d;
  for (const auto& [name, value] : row) d[name.c_str()] = py::cast(value);
  return d;
}

py::list dicts(const std::vector<tables::Row>& rows) {
  py::list list;
  for (const tables::Row& row : rows) list.append(dict(row));
  return list;
}

// What a Python dictionary counts its changes by, 0 where it does not: since 3.13.
uint64_t version_of(PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030D0000 && !defined(PYPY_VERSION)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  (void)dictionary;
  return 0;
#endif
}

constexpr Py_ssize_t kAhead = 16;

// The dictionaries that a recording depends on, when all in them was last seen to be as it was. One line of each is
// read where the look at what is in them reads four: preactivation ResNet-164 has 15000 entries in 1700 of them.
class Versions {
 public:
  // They belong to these tuples, which are to be given to every `unchanged` with this object.
  Versions(const py::tuple& entries, const py::tuple& sizes) : entries_(entries.ptr()), sizes_(sizes.ptr()) {
    std::unordered_set<PyObject*> seen;
    auto add = [&](const py::tuple& t, size_t step) {
      for (size_t i = 0; i < t.size(); i += step)
        if (PyObject* const d = PyTuple_GET_ITEM(t.ptr(), static_cast<Py_ssize_t>(i)); seen.insert(d).second) {
          if (!PyDict_Check(d)) throw py::type_error("entries, sizes: expected dictionaries");
          states_.push_back({d, 0});
        }
    };
    add(entries, 3);
    add(sizes, 2);
  }
  bool are_of(const py::tuple& entries, const py::tuple& sizes) const {
    return entries_ == entries.ptr() && sizes_ == sizes.ptr();
  }
  bool same() const {
    for (size_t i = 0; i < states_.size(); ++i) {
      if (i + kAhead < states_.size()) __builtin_prefetch(states_[i + kAhead].dictionary);
      if (const uint64_t now = version_of(states_[i].dictionary); !now || now != states_[i].version) return false;
    }
    return true;
  }
  void take() {
    for (State& s : states_) s.version = version_of(s.dictionary);
  }

 private:
  struct State {
    PyObject* dictionary;  // borrowed: owning them, out of sight of Python's collector, would keep a model forever
    uint64_t version;
  };
  PyObject *entries_, *sizes_;
  std::vector<State> states_;
};

PyObject* at(const py::tuple& t, Py_ssize_t i) { return PyTuple_GET_ITEM(t.ptr(), i); }
void ask(const py::tuple& t, Py_ssize_t i) {
  if (i < PyTuple_GET_SIZE(t.ptr())) __builtin_prefetch(at(t, i));
}
void check(bool ok) {
  if (!ok && PyErr_Occurred()) throw py::error_already_set();
}

bool dictionaries_unchanged(const py::tuple& entries, const py::tuple& sizes) {
  for (Py_ssize_t i = 0; i + 2 < PyTuple_GET_SIZE(entries.ptr()); i += 3) {
    ask(entries, i + 3 * kAhead);
    PyObject* const value = PyDict_GetItemWithError(at(entries, i), at(entries, i + 1));  // borrowed
    check(value);
    if ((value ? value : Py_None) != at(entries, i + 2)) return false;
  }
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(sizes.ptr()); i += 2) {
    ask(sizes, i + 2 * kAhead);
    const Py_ssize_t size = PyDict_Size(at(sizes, i));
    check(size >= 0);
    if (size != PyLong_AsSsize_t(at(sizes, i + 1))) return false;
  }
  return true;
}

// Whether what a recording depends on is as it was. Asked on every call, after kernels that left nothing of Python's in
// the caches, so the dictionaries and tensors behind the next ones are asked for meanwhile.
bool unchanged(const py::tuple& entries, const py::tuple& sizes, const py::tuple& versions, const py::object& watched,
               Versions* dictionaries) {
  if (dictionaries && !dictionaries->are_of(entries, sizes))
    throw py::value_error("dictionaries: expected what was made of the same entries and sizes");
  if (!dictionaries || !dictionaries->same()) {
    if (!dictionaries_unchanged(entries, sizes)) return false;
    if (dictionaries) dictionaries->take();
  }
  if (!resnet_fused::tensors_unchanged(reinterpret_cast<const void*>(watched.attr("data_ptr")().cast<uintptr_t>())))
    return false;
  static const py::handle name = py::str("_version").release();
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(versions.ptr()); i += 2) {
    ask(versions, i + 2 * kAhead);
    const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(at(versions, i), name.ptr()));
    check(now.ptr());
    if (PyLong_AsLong(now.ptr()) != PyLong_AsLong(at(versions, i + 1))) return false;
  }
  return true;
}

}  // namespace

PYBIND11_MODULE(_bindings, m) {
  m.doc() = "Instruction sets, kernel table, cost model and memory of the native library.";
  m.def("isa", [] { return kernels().name; }, "The instruction set in use.");
  m.def("isas", &tables::isas, "Those that this machine runs.");
  m.def(
      "set_isa", [](const std::string& name) { select_isa(isa_named(name)); }, py::arg("name"),
      "Use another one; packed weights depend on it.");
  m.def("kernel_table", [] { return dicts(tables::kernel_table()); }, "One dict a compiled kernel.");
  m.def(
      "cost",
      [](const std::string& op, const tables::Dims& dims, const std::string& dtype, const std::string& algorithm,
         int threads) { return dict(tables::cost(op, dims, dtype, algorithm, threads)); },
      py::arg("op"), py::arg("dims"), py::arg("dtype"), py::arg("algorithm"), py::arg("threads"),
      "Predicted seconds, FLOPs, bytes and workspace of a layer or block.");
  m.def("cached_bytes", &cached_bytes, "Bytes kept: idle outputs and workspaces.");
  m.def("release_memory", &release_memory, "Give them back to the system; no kernel may be running.");
  m.def("pool_limit", &pool_limit, "Most bytes of idle outputs that are kept.");
  m.def("set_pool_limit", &set_pool_limit, py::arg("bytes"));
  py::class_<Versions>(m, "_Versions");
  m.def(
      "dictionaries", [](const py::tuple& entries, const py::tuple& sizes) { return Versions(entries, sizes); },
      py::arg("entries"), py::arg("sizes"), "What makes `unchanged` faster for these, which it does not keep alive.");
  m.def("unchanged", &unchanged, py::arg("entries"), py::arg("sizes"), py::arg("versions"), py::arg("watched"),
        py::arg("dictionaries") = nullptr,
        "Whether dictionary.get(key) is value for each three of `entries`, len(dictionary) == size for each two of "
        "`sizes`, tensor._version == version for each two of `versions`, and the tensors that `_watch` made `watched` "
        "of are where and what they were.");
  m.def("poison_workspaces", &poison_workspaces, "Fill the workspaces with NaN (tests).");
#ifdef RESNET_FUSED_CUDA
  m.def(
      "cuda_kernel_table", [] { return dicts(tables::cuda_kernel_table()); },
      "One dict a compiled CUDA kernel; registers and occupancy where a GPU tells.");
  m.def("cuda_driver_lack", &tables::cuda_driver_lack,
        "Why the NVIDIA driver is too old for the CUDA runtime of the kernels; empty if it is not, or there is none.");
  m.def(
      "cuda_candidates",
      [](const std::string& op, const tables::Dims& dims, const std::string& dtype, int arch, int multiprocessors,
         int shared_bytes) {
        std::string why;
        py::list found;
        for (const auto& c : tables::cuda_candidates(op, dims, dtype, arch, multiprocessors, shared_bytes, &why))
          found.append(py::make_tuple(c.algorithm, c.kernel, c.microseconds));
        return py::make_tuple(found, why);
      },
      py::arg("op"), py::arg("dims"), py::arg("dtype"), py::arg("arch"), py::arg("multiprocessors"),
      py::arg("shared_bytes"),
      "((algorithm, kernel, predicted microseconds), ...), best first, and why there is none.");
#endif
}
