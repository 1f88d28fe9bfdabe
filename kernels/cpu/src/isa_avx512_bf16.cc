#define KERNELS kernels_avx512_bf16
#define KERNELS_NAME "avx512_bf16"
#include "kernels.inc.h"
