// The tensors of an optimiser's step as Python has them: a list of parameters, and lists with a tensor a parameter.
// What is seen here needs no look in Python, which takes longer than the update of hundreds of small tensors.
#pragma once

#include "tensors.h"

namespace fastjem {

class Gathered {
  struct Span {
    const char *begin, *end;
  };
  std::vector<Plain> parameters_;
  std::vector<Span> written_, read_;

  static void add(const Plain& x, std::vector<Span>& spans) {
    if (x.elements) spans.push_back({x.data, x.data + x.elements * x.itemsize});
  }

  // Calls f(i, tensor) for each of the list's, with nullptr for None, as long as all is good.
  template <class F>
  void each(pybind11::handle list, F&& f) {
    good = good && PyList_CheckExact(list.ptr());
    const Py_ssize_t count = good ? PyList_GET_SIZE(list.ptr()) : 0;
    Plain seen;
    for (Py_ssize_t i = 0; i < count && good; ++i) {
      const pybind11::handle x = PyList_GET_ITEM(list.ptr(), i);
      if (x.is_none()) {
        f(i, static_cast<const Plain*>(nullptr));
      } else {
        good = look_at(x, seen);
        if (good) f(i, const_cast<const Plain*>(&seen));
      }
    }
  }

 public:
  bool good = true;  // whether all that was given is plain, and fits the parameters

  explicit Gathered(pybind11::handle parameters) {
    each(parameters, [&](size_t, const Plain* x) {
      good = x && (x->dtype == 0 || x->dtype == 1) && x->has_layout_of(*x);
      if (!good) return;
      add(*x, written_);
      parameters_.push_back(*x);
    });
  }

  size_t size() const { return parameters_.size(); }
  const Plain& operator[](size_t i) const { return parameters_[i]; }

  // Calls f(parameter's number, tensor) for those of a list of gradients.
  template <class F>
  void gradients(pybind11::handle list, F&& f) {
    size_t count = 0;
    each(list, [&](size_t i, const Plain* x) {
      good = x && i < size() && x->is_floating() && x->has_layout_of(parameters_[i]);
      if (!good) return;
      add(*x, read_);
      f(i, *x);
      ++count;
    });
    good = good && count == size();
  }

  // Calls f(parameter's number, memory) for those of a list of averages or teachers, which may end early or have None
  // for a parameter.
  template <class F>
  void beside(pybind11::handle list, F&& f) {
    each(list, [&](size_t i, const Plain* x) {
      if (!x) return;
      good = i < size() && x->dtype == parameters_[i].dtype && x->has_layout_of(parameters_[i]);
      if (!good) return;
      add(*x, written_);
      f(i, x->data);
    });
  }

  // Calls f(parameter's number, memory) for the counters of steps, which all parameters have.
  template <class F>
  void steps(pybind11::handle list, F&& f) {
    size_t count = 0;
    each(list, [&](size_t i, const Plain* x) {
      good = x && i < size() && x->dtype == 0 && x->elements == 1;
      if (!good) return;
      add(*x, written_);
      f(i, reinterpret_cast<float*>(x->data));
      ++count;
    });
    good = good && count == size();
  }

  // Whether all of it is good, each tensor that is written has memory of its own, and none is a gradient.
  bool may_be_written() {
    if (!good) return false;
    const auto begins_before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
    std::sort(written_.begin(), written_.end(), begins_before);
    for (size_t i = 1; i < written_.size(); ++i) {
      if (written_[i - 1].end > written_[i].begin) return false;
    }
    for (const Span& gradient : read_) {
      const Span end{gradient.end, gradient.end};
      const auto after = std::lower_bound(written_.begin(), written_.end(), end, begins_before);
      if (after != written_.begin() && (after - 1)->end > gradient.begin) return false;
    }
    return true;
  }
};

}  // namespace fastjem
