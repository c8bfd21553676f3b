#include "kernels.h"

PyMethodDef codec_methods[] = {
    {NULL, NULL, 0, NULL},
};
