// What the Python loader asks the CUDA library about itself, over ctypes.

// The architectures it was built for, as in FASTXATTN_CUDA_ARCHS.
extern "C" __attribute__((visibility("default"))) const char* fastxattn_cuda_archs() { return FXA_CUDA_ARCHS; }
