// Memory for one call, from an address that 64 divides. Large pieces are kept when they are given back, for the next
// call: the system clears each page of new memory, which takes a twentieth of a prompt's time.
#pragma once
#include <cstdint>

namespace mopeq {

class Memory {
 public:
  explicit Memory(int64_t count, int64_t bytes = 1);  // so many of so many bytes each; std::bad_alloc
  ~Memory();
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  char *data() const { return data_; }
  float *floats() const { return reinterpret_cast<float *>(data_); }

 private:
  char *data_;
  int64_t size_;
};

// Gives what is kept back to the system.
void release();

}  // namespace mopeq
