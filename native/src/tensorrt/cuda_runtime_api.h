// Instead of CUDA's header of this name, of which TensorRT's headers take two names: no CUDA is needed to build.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
