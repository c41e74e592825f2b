// Calls one handler of the C++ kernels as XLA would: its arguments come on standard
// input, its result goes to standard output. So another CPU's kernels can be asked.
//
//   name, numbers of arguments and attributes
//   per argument, then for the result: XLA's data type, bytes an item, rank, dimensions
//   per attribute: name, data type, value
//   an empty line, then the arguments' bytes
#include <dlfcn.h>

#include <iostream>
#include <list>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

// More than one: work is cut as for several threads, here one after the other.
constexpr int64_t kThreads = 3;

struct Given {
  XLA_FFI_Buffer buffer{};
  std::vector<int64_t> dims;
  std::vector<char> bytes;

  explicit Given(std::istream& in) {
    int dtype;
    int64_t size, rank;
    in >> dtype >> size >> rank;
    dims.resize(rank);
    for (int64_t& dim : dims) in >> dim, size *= dim;
    bytes.resize(size);
    buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    buffer.dtype = XLA_FFI_DataType(dtype);
    buffer.data = bytes.data();
    buffer.rank = rank;
    buffer.dims = dims.data();
  }
  Given(const Given&) = delete;
};

struct Attribute {
  std::string name;
  XLA_FFI_ByteSpan span;
  XLA_FFI_Scalar scalar;
  float number;
  int64_t integer;

  explicit Attribute(std::istream& in) {
    int dtype;
    in >> name >> dtype;
    const bool real = dtype == XLA_FFI_DataType_F32;
    if (real) in >> number;
    else in >> integer;
    span = {name.data(), name.size()};
    scalar = {XLA_FFI_DataType(dtype), real ? (void*)&number : (void*)&integer};
  }
  Attribute(const Attribute&) = delete;
};

XLA_FFI_Error* failed(XLA_FFI_Error_Create_Args* args) {
  std::cerr << args->message << "\n";
  std::exit(1);
}
XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  args->task(args->data);
  return nullptr;
}
XLA_FFI_Error* threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = kThreads;
  return nullptr;
}

}  // namespace

int main() {
  std::string name;
  int inputs, attributes;
  std::cin >> name >> inputs >> attributes;
  std::list<Given> given;
  std::vector<void*> args, attrs;
  for (int i = 0; i < inputs; ++i) args.push_back(&given.emplace_back(std::cin).buffer);
  Given result(std::cin);
  std::list<Attribute> named;
  std::vector<XLA_FFI_ByteSpan*> names;
  for (int i = 0; i < attributes; ++i) {
    Attribute& one = named.emplace_back(std::cin);
    names.push_back(&one.span);
    attrs.push_back(&one.scalar);
  }
  std::cin.ignore(1);
  for (Given& one : given) std::cin.read(one.bytes.data(), one.bytes.size());

  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
  api.api_version.major_version = XLA_FFI_API_MAJOR;
  api.api_version.minor_version = XLA_FFI_API_MINOR;
  api.XLA_FFI_Error_Create = failed;
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_ThreadPool_NumThreads = threads;
  std::vector<XLA_FFI_ArgType> kinds(inputs, XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_AttrType> scalars(attributes, XLA_FFI_AttrType_SCALAR);
  XLA_FFI_RetType kind = XLA_FFI_RetType_BUFFER;
  void* results[] = {&result.buffer};
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, inputs, kinds.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, 1, &kind, results};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      attributes,
                 scalars.data(),            names.data(), attrs.data()};
  void* const found = dlsym(RTLD_DEFAULT, name.c_str());
  if (!found || !std::cin) {
    std::cerr << name << ": not there, or too few bytes\n";
    return 1;
  }
  reinterpret_cast<XLA_FFI_Handler*>(found)(&frame);
  std::cout.write(result.bytes.data(), result.bytes.size());
}
