// All kernels for the instruction set that this is compiled for; the includer defines KERNELS, the name of the table.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "abi.h"
#include "vector.h"
// The order matters: each uses what stands before it.
#include "rows.inc.h"
#include "linear.inc.h"
#include "attention.inc.h"
#include "draw.inc.h"

namespace headrace {

const Kernels* KERNELS() {
  static const Kernels kernels = {
      KERNELS_NAME, embed,  norm,          pack,         gated,  activate, add,
      scale_rows,   soft_cap_rows, linear, gated_linear, {rotate_store<uint16_t>, rotate_store<uint8_t>},
      {attend<uint16_t>, attend<uint8_t>}, merge, best, draw_row,
  };
  return &kernels;
}

}  // namespace headrace
