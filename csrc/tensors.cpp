#include "tensors.h"

namespace fastjem {

// The part of DLPack's interface that is needed (dlpack.h, version 1), which never changes within a major version.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct DlExchangeTable {
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_python, *to_python;
  int (*look)(void* python_object, DlTensor* out);
  void* stream;
};

static constexpr int32_t dl_cpu = 1;
static constexpr uint8_t dl_int = 0, dl_float = 2, dl_bfloat = 4;

// What `learn_tensors` was told; without it no tensor is plain.
static const DlExchangeTable* table = nullptr;
static PyTypeObject* tensor_type = nullptr;
static PyTypeObject* parameter_type = nullptr;

bool Plain::is_contiguous() const {
  if (!strides) return true;
  int64_t expected = 1;
  for (int i = dims - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) return elements == 0;
    expected *= shape[i];
  }
  return true;
}

bool Plain::has_shape_of(const Plain& other) const {
  return dims == other.dims && std::equal(shape, shape + dims, other.shape);
}

bool Plain::has_layout_of(const Plain& other) const {
  if (!has_shape_of(other)) return false;
  const bool contiguous = is_contiguous();
  if (contiguous != other.is_contiguous()) return false;
  if (contiguous) return true;
  std::vector<std::pair<int64_t, int64_t>> lengths;  // by stride
  for (int i = 0; i < dims; ++i) {
    if (shape[i] == 1) continue;
    if (strides[i] != other.strides[i]) return false;
    lengths.emplace_back(strides[i], shape[i]);
  }
  std::sort(lengths.begin(), lengths.end());
  int64_t expected = 1;
  for (const auto& [stride, length] : lengths) {
    if (stride != expected) return false;
    expected *= length;
  }
  return true;
}

static int dtype_of(const DlTensor& x) {
  if (x.lanes != 1) return -1;
  if (x.code == dl_float) return x.bits == 32 ? 0 : x.bits == 64 ? 1 : x.bits == 16 ? 3 : -1;
  if (x.code == dl_bfloat) return x.bits == 16 ? 2 : -1;
  return x.code == dl_int && x.bits == 64 ? Plain::int64 : -1;
}

// A method without arguments of torch's C++, called without Python's search for it, which takes longer than the method.
class Method {
 public:
  void find(pybind11::handle type, const char* name) {
    descriptor_ = pybind11::object(type.attr(name)).release().ptr();
    function_ = nullptr;
    if (Py_TYPE(descriptor_) == &PyMethodDescr_Type) {
      const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(descriptor_)->d_method;
      if (method->ml_flags == METH_NOARGS) function_ = method->ml_meth;
    }
  }

  PyObject* operator()(PyObject* self) const {
    return function_ ? function_(self, nullptr) : PyObject_CallOneArg(descriptor_, self);
  }

  // For one that returns an integer; -1 where it raised.
  int64_t integer(PyObject* self) const {
    PyObject* result = (*this)(self);
    if (!result) return -1;
    const int64_t value = PyLong_AsLongLong(result);
    Py_DECREF(result);
    return value;
  }

  // For one that returns a truth value; true where it raised, as nothing good is said of x then.
  bool truth(PyObject* self) const {
    PyObject* result = (*this)(self);
    if (!result) return true;
    Py_DECREF(result);
    return result != Py_False;
  }

 private:
  PyObject* descriptor_ = nullptr;
  PyCFunction function_ = nullptr;
};

static Method is_neg, untyped_storage, nbytes, data_ptr;

// Where the storage of x begins and how many bytes it has. `x.untyped_storage().resize_(0)` frees the memory of a
// tensor that is still there, as FSDP does with parameters outside of forward.
static bool storage_of(PyObject* x, int64_t& begin, int64_t& bytes) {
  PyObject* storage = untyped_storage(x);
  if (!storage) return false;
  begin = data_ptr.integer(storage);
  bytes = nbytes.integer(storage);
  Py_DECREF(storage);
  return begin != -1 && bytes != -1;
}

static bool look(PyObject* x, Plain& plain) {
  if (!table || (Py_TYPE(x) != tensor_type && Py_TYPE(x) != parameter_type)) return false;
  DlTensor seen{};
  if (table->look(x, &seen) != 0 || seen.device_type != dl_cpu) return false;
  plain.data = static_cast<char*>(seen.data) + seen.byte_offset;
  plain.dims = seen.ndim;
  plain.shape = seen.shape;
  plain.strides = seen.strides;
  plain.dtype = dtype_of(seen);
  plain.itemsize = (seen.bits * seen.lanes + 7) / 8;
  plain.elements = 1;
  int64_t last = 0;
  for (int i = 0; i < seen.ndim; ++i) {
    plain.elements *= seen.shape[i];
    last += (seen.shape[i] - 1) * seen.strides[i];
  }
  // A view of an imaginary part may be waiting for its sign, which the dispatcher would see to. Every second number is
  // one: such a view isn't contiguous, or is of one number. (To ask takes as long as all the rest.)
  if ((plain.elements == 1 || !plain.is_contiguous()) && is_neg.truth(x)) return false;
  int64_t begin;
  int64_t bytes;
  if (!storage_of(x, begin, bytes)) return false;
  plain.storage_end = reinterpret_cast<const char*>(begin + bytes);
  if (!plain.elements) return true;
  return begin != 0 && plain.data + (last + 1) * plain.itemsize <= plain.storage_end;
}

bool look_at(pybind11::handle x, Plain& plain) {
  if (look(x.ptr(), plain)) return true;
  PyErr_Clear();
  return false;
}

// Calls f for each element of a list or tuple until it returns false, which is then the result; false for others.
template <class F>
static bool all_of(PyObject* sequence, F&& f) {
  if (!PyList_CheckExact(sequence) && !PyTuple_CheckExact(sequence)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!f(PySequence_Fast_GET_ITEM(sequence, i))) return false;
  }
  return true;
}

// Whether all tensors among an operator's arguments, lists of them too, are plain.
static bool plain(pybind11::handle arguments) {
  Plain seen;
  return all_of(arguments.ptr(), [&](PyObject* argument) {
    if (PyObject_TypeCheck(argument, tensor_type)) return look_at(argument, seen);
    if (!PyList_CheckExact(argument)) return true;
    return all_of(argument, [&](PyObject* x) { return !PyObject_TypeCheck(x, tensor_type) || look_at(x, seen); });
  });
}

// Whether all are plain and floating-point, not empty, of so many dimensions, and `same`: of one shape.
static bool plain_matrices(pybind11::handle tensors, int dims, bool same) {
  Plain first;
  Plain next;
  bool is_first = true;
  return all_of(tensors.ptr(), [&](PyObject* x) {
    Plain& seen = is_first ? first : next;
    if (!look_at(x, seen) || seen.dims != dims || !seen.elements || !seen.is_floating()) return false;
    if (same && !is_first && !next.has_shape_of(first)) return false;
    is_first = false;
    return true;
  });
}

// Whether x is plain, of float32 or float64, and of at most `most` elements, but not of none.
static bool few(pybind11::handle x, int64_t most, Plain& seen) {
  return look_at(x, seen) && (seen.dtype == 0 || seen.dtype == 1) && seen.elements > 0 && seen.elements <= most;
}

// And the labels plain, int64, one for each row: of its columns or `ignore_index`, and not all of them that.
static bool few_with_labels(pybind11::handle x, pybind11::handle labels, int64_t ignore_index, int64_t most) {
  Plain rows;
  Plain seen;
  if (!few(x, most, rows) || rows.dims != 2 || !look_at(labels, seen) || seen.dtype != Plain::int64 || seen.dims != 1 ||
      seen.shape[0] != rows.shape[0] || !seen.is_contiguous()) {
    return false;
  }
  const int64_t* label = reinterpret_cast<const int64_t*>(seen.data);
  bool counts = false;
  for (int64_t i = 0; i < rows.shape[0]; ++i) {
    if (label[i] == ignore_index) continue;
    if (label[i] < 0 || label[i] >= rows.shape[1]) return false;
    counts = true;
  }
  return counts;
}

// And y of the same shape and dtype.
static bool few_alike(pybind11::handle x, pybind11::handle y, int64_t most) {
  Plain first;
  Plain second;
  return few(x, most, first) && first.dims > 0 && few(y, most, second) && second.dtype == first.dtype &&
         second.has_shape_of(first);
}

// What can be known of plain tensors without their elements, as bytes: equal for tensors that are where they were, and
// as large. None where one isn't plain, or of another dtype. Strides are written of those that aren't contiguous.
static pybind11::object facts(pybind11::handle targets, pybind11::handle sources) {
  std::vector<int64_t> numbers;
  numbers.reserve(2048);
  Plain seen;
  const auto write = [&](PyObject* x) {
    if (!look_at(x, seen) || seen.dtype < 0) return false;
    const bool contiguous = seen.is_contiguous();
    numbers.push_back(reinterpret_cast<int64_t>(seen.data));
    numbers.push_back(reinterpret_cast<int64_t>(seen.storage_end));
    numbers.push_back((seen.dtype * 256 + seen.itemsize) * 256 + seen.dims * 2 + contiguous);
    numbers.insert(numbers.end(), seen.shape, seen.shape + seen.dims);
    if (!contiguous) numbers.insert(numbers.end(), seen.strides, seen.strides + seen.dims);
    return true;
  };
  if (!all_of(targets.ptr(), write) || !all_of(sources.ptr(), write)) return pybind11::none();
  return pybind11::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
}

std::vector<Plain> tensors_of(const char* facts, size_t bytes) {
  std::vector<Plain> tensors;
  const auto* number = reinterpret_cast<const int64_t*>(facts);
  const auto* end = number + bytes / sizeof(int64_t);
  while (number < end) {
    Plain x{};
    x.data = reinterpret_cast<char*>(*number++);
    x.storage_end = reinterpret_cast<const char*>(*number++);
    const int64_t kind = *number++;
    x.dtype = static_cast<int>(kind / 65536);
    x.itemsize = kind / 256 % 256;
    x.dims = static_cast<int>(kind % 256 / 2);
    x.shape = number;
    number += x.dims;
    x.strides = kind % 2 ? nullptr : number;
    if (x.strides) number += x.dims;
    x.elements = 1;
    for (int i = 0; i < x.dims; ++i) x.elements *= x.shape[i];
    tensors.push_back(x);
  }
  return tensors;
}

// torch.Tensor, torch.nn.Parameter, torch.UntypedStorage and the capsule of the exchange table, or None where torch has
// none.
static void learn_tensors(pybind11::handle tensor, pybind11::handle parameter, pybind11::handle storage,
                          pybind11::handle capsule) {
  is_neg.find(tensor, "is_neg");
  untyped_storage.find(tensor, "untyped_storage");
  nbytes.find(storage, "nbytes");
  data_ptr.find(storage, "data_ptr");
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  table = nullptr;
  if (capsule.is_none()) return;
  const void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!pointer) throw pybind11::error_already_set();
  const auto* offered = static_cast<const DlExchangeTable*>(pointer);
  if (offered->major == 1 && offered->look) table = offered;
}

void bind_tensors(pybind11::module_& m) {
  m.def("learn_tensors", &learn_tensors);
  m.def("plain", &plain);
  m.def("plain_matrices", &plain_matrices);
  m.def("few_with_labels", &few_with_labels);
  m.def("few_alike", &few_alike);
  m.def("facts", &facts);
}

}  // namespace fastjem
