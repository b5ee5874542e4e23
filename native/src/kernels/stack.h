// All layers of a decoder over paged keys and values, for a whole step in one call: step.cpp and decode.cpp.
#pragma once

#include <vector>

#include "attend_work.h"
#include "block.h"
#include "rope.h"
#include "select.h"

namespace hasten {

// Memory of at least `count` elements, which stays with its owner for the next step.
template <typename T>
T* grown(std::vector<T>& memory, std::size_t count) {
  if (memory.size() < count) memory.resize(count);
  return memory.data();
}

struct Stack {
  struct Layer {
    const Block* block;
    void *k, *v;
    int rope, reading;  // which of a step's rotary tables and readings it uses
  };
  std::vector<Layer> layers;
  std::int64_t pages = 0;
  int page = 0;
  int kind = 0;  // a PageKind
  int ropes = 0, readings = 0;

  int hidden() const { return layers.front().block->hidden; }
};

// Raises ValueError for a capsule of another kind.
const Stack& unwrap_stack(const nb::capsule& handle);

// What the layers of one kind read: everything that a schedule says.
struct Read {
  const attend::Work* work = nullptr;
  float scale = 0, softcap = 0;  // softmax scale, soft cap (0: none)
};

// What decode rows read where a policy chooses, by layer: null selectors read what their schedule says.
struct Choosing {
  std::vector<const Selector*> selector;
  const std::int32_t *table, *length;  // pages [rows][width] and tokens of the rows
  int width;
  int longest;
  int shortest;  // of the lengths: layers whose budget exceeds it read densely (keys are noted all the same)
};

// x[rows][hidden] goes through all layers in place; keys and values are cached at `slot`. tables: one per rope, rows in
// order. All of it has been checked. False if a choice named a token without a page.
bool run_stack(const Stack& stack, float* x, int rows, const std::int64_t* slot, const std::vector<rope::Tables>& tables,
               const std::vector<Read>& reads, const Choosing* choosing);

// Raises ValueError unless the reads fit the stack's layers and `rows` rows.
void check_reads(const Stack& stack, const std::vector<Read>& reads, int rows);

}  // namespace hasten
