#define KERNELS kernels_generic
#define KERNELS_NAME "generic"
#include "kernels.inc.h"
