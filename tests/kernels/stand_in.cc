// XLA, played for the native kernel's library where there is no JAX: on an emulated processor.
//
// Usage: stand_in LIBRARY. Says how wide the library's vectors are, then answers calls until its
// input ends. `arm.py` has the other side, and the order of what passes.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace {

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

void* symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  return found ? found : (fail(dlerror()), nullptr);
}

template <class T>
void read(T* to, std::size_t count) {
  if (std::fread(to, sizeof(T), count, stdin) != count) fail("the input ended within a call");
}

std::int64_t read_number() {
  std::int64_t value;
  read(&value, 1);
  return value;
}

// A text whose length comes first.
std::string read_text() {
  std::string text(read_number(), '\0');
  read(text.data(), text.size());
  return text;
}

// An array with the memory that it lies in: XLA promises 64 bytes of alignment.
struct Array {
  XLA_FFI_DataType dtype;
  std::vector<std::int64_t> dims;
  std::size_t count = 1, bytes;
  void* data;
  XLA_FFI_Buffer buffer;

  Array() {
    dtype = static_cast<XLA_FFI_DataType>(read_number());
    dims.resize(read_number());
    read(dims.data(), dims.size());
    for (const std::int64_t size : dims) count *= size;
    bytes = count * (dtype == XLA_FFI_DataType_F32 ? 4 : 8);
    data = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
    buffer = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr,    dtype, data,
              std::int64_t(dims.size()),  dims.data()};
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }
};

XLA_FFI_Error* say_error(XLA_FFI_Error_Create_Args* error) { fail(error->message); }

bool subnormals_are_there() {
  volatile float smallest = 1e-45f, one = 1;
  return smallest * one > 0;
}

}  // namespace

int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) fail(dlerror());
  const auto vector_bytes = reinterpret_cast<int (*)()>(symbol(library, "kip_vector_bytes"));
  const auto best =
      reinterpret_cast<const char* (*)()>(symbol(library, "kip_best_instruction_set"));
  std::printf("%s %d\n", best(), vector_bytes());
  std::fflush(stdout);

  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.XLA_FFI_Error_Create = say_error;
  for (int next; (next = std::getchar()) != EOF;) {
    std::ungetc(next, stdin);
    auto* handler = reinterpret_cast<XLA_FFI_Handler*>(symbol(library, read_text().c_str()));

    std::deque<Array> arguments, results, values;
    std::vector<void*> argument_buffers, result_buffers;
    for (std::int64_t k = read_number(); k > 0; --k) {
      Array& array = arguments.emplace_back();
      read(static_cast<char*>(array.data), array.bytes);
      argument_buffers.push_back(&array.buffer);
    }
    for (std::int64_t k = read_number(); k > 0; --k)
      result_buffers.push_back(&results.emplace_back().buffer);

    // An attribute without dimensions is a scalar.
    std::deque<std::string> names;
    std::deque<XLA_FFI_ByteSpan> spans;
    std::deque<XLA_FFI_Scalar> scalars;
    std::deque<XLA_FFI_Array> arrays;
    std::vector<XLA_FFI_ByteSpan*> span_pointers;
    std::vector<XLA_FFI_AttrType> types;
    std::vector<void*> attributes;
    for (std::int64_t k = read_number(); k > 0; --k) {
      const std::string& name = names.emplace_back(read_text());
      span_pointers.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{name.data(), name.size()}));
      Array& array = values.emplace_back();
      read(static_cast<char*>(array.data), array.bytes);
      types.push_back(array.dims.empty() ? XLA_FFI_AttrType_SCALAR : XLA_FFI_AttrType_ARRAY);
      if (array.dims.empty())
        attributes.push_back(&scalars.emplace_back(XLA_FFI_Scalar{array.dtype, array.data}));
      else
        attributes.push_back(
            &arrays.emplace_back(XLA_FFI_Array{array.dtype, array.count, array.data}));
    }

    std::vector<XLA_FFI_ArgType> argument_types(arguments.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);
    XLA_FFI_CallFrame frame{};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &api;
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, std::int64_t(arguments.size()),
                  argument_types.data(), argument_buffers.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, std::int64_t(results.size()),
                  result_types.data(), result_buffers.data()};
    frame.attrs = {
        XLA_FFI_Attrs_STRUCT_SIZE, nullptr,          std::int64_t(attributes.size()), types.data(),
        span_pointers.data(),      attributes.data()};
    handler(&frame);
    if (!subnormals_are_there()) fail("the call left subnormal numbers flushed");
    for (const Array& array : results) std::fwrite(array.data, 1, array.bytes, stdout);
    std::fflush(stdout);
  }
}
