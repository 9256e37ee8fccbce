// The handlers that XLA calls. Shapes: images [A, H, W, D], tables [A, table], blocks [A, B], in
// float32 or float64, and readouts [A, 2] in float64.
#include <stdexcept>
#include <string>

#include "blocks.h"
#include "xla/ffi/api/ffi.h"

namespace kip {
namespace {

namespace ffi = xla::ffi;
using Array = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;
using Attributes = ffi::Dictionary;

template <class A>
A attribute(const Attributes& attributes, const char* name) {
  const auto value = attributes.get<A>(name);
  if (!value) throw std::invalid_argument(std::string("missing attribute ") + name);
  return *value;
}

// The attributes that all handlers take: the network, and the number of threads.
struct Settings {
  Network network;
  std::size_t threads;

  explicit Settings(const Attributes& attributes) {
    const auto convs = attribute<ffi::Span<const std::int64_t>>(attributes, "convs");
    network.convs.assign(convs.begin(), convs.end());
    network.all_offsets = attribute<std::int64_t>(attributes, "all_offsets") != 0;
    network.hidden = static_cast<int>(attribute<std::int64_t>(attributes, "hidden"));
    network.nngp = attribute<std::int64_t>(attributes, "nngp") != 0;
    network.w = attribute<double>(attributes, "w");
    network.b = attribute<double>(attributes, "b");
    threads = static_cast<std::size_t>(attribute<std::int64_t>(attributes, "threads"));
  }

  // For images like x.
  Plan plan(const Array& x, bool pair) const {
    const auto shape = x.dimensions();
    return make_plan(network, static_cast<int>(shape[1]), static_cast<int>(shape[2]),
                     static_cast<int>(shape[3]), pair);
  }
};

template <class T>
T* data(const Array& array) {
  return static_cast<T*>(array.untyped_data());
}
template <class T>
T* data(Out& out) {
  return static_cast<T*>(out->untyped_data());
}

template <class T>
ImageSet<T> image_set(const Array& x, const Array& q, const Array& r) {
  return {data<T>(x), data<T>(q), data<double>(r), x.dimensions()[0]};
}

// Calls f(T{}) for the array's type T, and returns as an error what it throws.
template <class F>
ffi::Error dispatch(const Array& x, F f) {
  try {
    switch (x.element_type()) {
      case ffi::DataType::F32:
        f(float{});
        break;
      case ffi::DataType::F64:
        f(double{});
        break;
      default:
        return ffi::Error(ffi::ErrorCode::kInvalidArgument, "expected float32 or float64");
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "the native kernel found no memory");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, error.what());
  }
  return ffi::Error::Success();
}

ffi::Error tables(Array x, Out out, Out readouts, const Attributes& attributes) {
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const Settings settings(attributes);
    compute_tables(settings.plan(x, false), data<T>(x), x.dimensions()[0], data<T>(out),
                   data<double>(readouts), settings.threads);
  });
}

ffi::Error block(Array x1, Array q1, Array r1, Array x2, Array q2, Array r2, Out out,
                 const Attributes& attributes) {
  return dispatch(x1, [&](auto zero) {
    using T = decltype(zero);
    const Settings settings(attributes);
    compute_block(settings.plan(x1, true), image_set<T>(x1, q1, r1), image_set<T>(x2, q2, r2),
                  attribute<std::int64_t>(attributes, "symmetric") != 0, data<T>(out),
                  settings.threads);
  });
}

ffi::Error vjp(Array x1, Array q1, Array r1, Array x2, Array q2, Array r2, Array cotangent, Out out,
               Out gradient, const Attributes& attributes) {
  return dispatch(x1, [&](auto zero) {
    using T = decltype(zero);
    const Settings settings(attributes);
    compute_vjp(settings.plan(x1, true), settings.plan(x1, false), image_set<T>(x1, q1, r1),
                image_set<T>(x2, q2, r2), data<const T>(cotangent), data<T>(out), data<T>(gradient),
                settings.threads);
  });
}

ffi::Error derivatives_of_block(Array x1, Array q1, Array r1, Array x2, Array q2, Array r2, Out out,
                                Out values, const Attributes& attributes) {
  return dispatch(x1, [&](auto zero) {
    using T = decltype(zero);
    const Settings settings(attributes);
    compute_derivatives(settings.plan(x1, true), image_set<T>(x1, q1, r1), image_set<T>(x2, q2, r2),
                        data<T>(out), data<T>(values), settings.threads);
  });
}

ffi::Error pull_back_cotangent(Array x1, Array q1, Array r1, Array values, Array cotangent,
                               Out gradient, const Attributes& attributes) {
  return dispatch(x1, [&](auto zero) {
    using T = decltype(zero);
    const Settings settings(attributes);
    pull_back(settings.plan(x1, true), settings.plan(x1, false), image_set<T>(x1, q1, r1),
              cotangent.dimensions()[1], data<const T>(values), data<const T>(cotangent),
              data<T>(gradient), settings.threads);
  });
}

}  // namespace
}  // namespace kip

// All else is hidden: libraries for several instruction sets may share a process, but no function.
#pragma GCC visibility push(default)

#define KIP_HANDLER(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, xla::ffi::Ffi::Bind() binding.Attrs())
#define KIP_ARRAY .Arg<xla::ffi::AnyBuffer>()
#define KIP_OUT .Ret<xla::ffi::AnyBuffer>()

KIP_HANDLER(KipTables, kip::tables, KIP_ARRAY KIP_OUT KIP_OUT);
KIP_HANDLER(KipBlock, kip::block,
            KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_OUT);
KIP_HANDLER(KipVjp, kip::vjp,
            KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_OUT KIP_OUT);
KIP_HANDLER(KipDerivatives, kip::derivatives_of_block,
            KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_OUT KIP_OUT);
KIP_HANDLER(KipPullBack, kip::pull_back_cotangent,
            KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_ARRAY KIP_OUT);

extern "C" {

// The best instruction set of this processor, of those that libraries are built for.
const char* kip_best_instruction_set() {
#if defined(__aarch64__)
  return "neon";
#else
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
    return "avx512";
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "avx2" : "portable";
#endif
}

// Bytes of this library's vectors.
int kip_vector_bytes() { return kip::kVectorBytes; }
}

#pragma GCC visibility pop
