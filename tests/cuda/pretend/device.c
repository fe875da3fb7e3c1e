/* What a card says of itself, through the runtime and through the driver. */
#include "pretend.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* source: NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities; memory as the driver of
 * such a card reports it (nvidia-smi). */
static const struct card CARDS[] = {
  {"t4", "Tesla T4", 75, 15095, 40, 1024, 65536, 4},
  {"l4", "NVIDIA L4", 89, 22703, 58, 1536, 101376, 48},
  {"a100", "NVIDIA A100-SXM4-40GB", 80, 40506, 108, 2048, 166912, 40},
  {"h100", "NVIDIA H100 80GB HBM3", 90, 81079, 132, 2048, 232448, 50},
};

const struct card *the_card(void) {
  static struct card chosen;
  if (chosen.key) return &chosen;
  const char *key = getenv("PRETEND_CARD");
  for (unsigned i = 0; i < sizeof CARDS / sizeof *CARDS; i++)
    if (!i || (key && !strcmp(CARDS[i].key, key))) chosen = CARDS[i];
  chosen.mebibytes = setting("PRETEND_MIB", chosen.mebibytes);
  return &chosen;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
  READY;
  const struct card *card = the_card();
  memset(of, 0, sizeof *of);
  snprintf(of->name, sizeof of->name, "%s", card->name);
  of->totalGlobalMem = (size_t)card->mebibytes << 20;
  of->major = card->capability / 10;
  of->minor = card->capability % 10;
  of->multiProcessorCount = card->multiprocessors;
  of->maxThreadsPerMultiProcessor = card->threads_per_multiprocessor;
  of->sharedMemPerBlock = 49152;
  of->sharedMemPerBlockOptin = card->shared_per_block;
  of->sharedMemPerMultiprocessor = card->shared_per_block + (card->capability == 75 ? 0 : 1024);
  of->l2CacheSize = card->l2_mebibytes << 20;
  of->regsPerBlock = of->regsPerMultiprocessor = of->totalConstMem = 65536;
  of->warpSize = 32;
  of->memPitch = of->maxGridSize[0] = 2147483647;
  of->maxGridSize[1] = of->maxGridSize[2] = 65535;
  of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
  of->maxThreadsDim[2] = 64;
  of->textureAlignment = 512;
  of->memoryBusWidth = 256;
  of->asyncEngineCount = 3;
  of->maxBlocksPerMultiProcessor = 16;
  of->canMapHostMemory = of->concurrentKernels = of->unifiedAddressing = of->managedMemory = 1;
  of->cooperativeLaunch = of->streamPrioritiesSupported = 1;
  return cudaSuccess;
}

/* The numbers of an attribute are the same in the runtime and the driver. */
static int attribute(int which) {
  struct cudaDeviceProp of;
  cudaGetDeviceProperties(&of, 0);
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return of.maxGridSize[0];
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return of.sharedMemPerBlockOptin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return of.sharedMemPerMultiprocessor;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return of.multiProcessorCount;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return of.maxThreadsPerMultiProcessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 16;
    case cudaDevAttrL2CacheSize: return of.l2CacheSize;
    case cudaDevAttrComputeCapabilityMajor: return of.major;
    case cudaDevAttrComputeCapabilityMinor: return of.minor;
    case cudaDevAttrClockRate: case cudaDevAttrMemoryClockRate: return 1000000;
    case cudaDevAttrGlobalMemoryBusWidth: return 256;
    case cudaDevAttrCooperativeLaunch: case cudaDevAttrUnifiedAddressing: case cudaDevAttrConcurrentKernels: return 1;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED: return 1;
    default: return 0;
  }
}

cudaError_t cudaGetDeviceCount(int *devices) { READY; *devices = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { READY; *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { READY; return device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) { READY; *value = attribute(which); return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { READY; *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int room, int device) { READY; snprintf(id, room, "0000:00:04.0"); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { READY; *can = 0; return cudaSuccess; }

CUresult cuInit(unsigned flags) { DRIVER_READY; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *devices) { DRIVER_READY; *devices = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { DRIVER_READY; *device = 0; return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int room, CUdevice device) { snprintf(name, room, "%s", the_card()->name); return CUDA_SUCCESS; }
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) { *bytes = (size_t)the_card()->mebibytes << 20; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) { DRIVER_READY; *value = attribute(which); return CUDA_SUCCESS; }
CUresult cuDeviceGetUuid_v2(CUuuid *id, CUdevice device) { memset(id, 7, sizeof *id); return CUDA_SUCCESS; }

static int context; /* its address is the one context there is */
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { DRIVER_READY; if (flags) *flags = 0; *active = 1; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *of, CUdevice device) { DRIVER_READY; *of = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *of) { DRIVER_READY; *of = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext of) { DRIVER_READY; return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext of) { DRIVER_READY; return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext *of) { DRIVER_READY; *of = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { DRIVER_READY; *device = 0; return CUDA_SUCCESS; }

/* ---- looked up by name: what is not written here succeeds and does nothing ---- */

void unanswered(const char *name) { if (setting("PRETEND_LOUD", 0)) fprintf(stderr, "pretended card: %s succeeds and does nothing\n", name); }
static int nothing(void) { return ready(); }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
  char versioned[128];
  snprintf(versioned, sizeof versioned, "%s_v2", name);
  *entry = dlsym(RTLD_DEFAULT, versioned);
  if (!*entry) *entry = dlsym(RTLD_DEFAULT, name);
  if (!*entry) { unanswered(name); *entry = (void *)nothing; }
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
CUresult cuGetProcAddress(const char *name, void **entry, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *found) {
  if (found) *found = CU_GET_PROC_ADDRESS_SUCCESS;
  return (CUresult)cudaGetDriverEntryPointByVersion(name, entry, version, flags, NULL);
}

static const char *words(int error) {
  switch (error) {
    case 0: return "no error";
    case 1: return "invalid argument";
    case 2: return "out of memory";
    case 3: return "initialization error";
    case 9: return "invalid configuration argument";
    case 101: return "invalid device ordinal";
    case 209: return "no kernel image is available for execution on the device";
    case 500: return "named symbol not found";
    case 700: return "an illegal memory access was encountered";
    case 900: return "operation not permitted when stream is capturing";
    case 901: return "operation failed due to a previous error during capture";
    default: return "an error of the pretended card";
  }
}
const char *cudaGetErrorString(cudaError_t error) { return words(error); }
const char *cudaGetErrorName(cudaError_t error) { return error == 2 ? "cudaErrorMemoryAllocation" : error == 3 ? "cudaErrorInitializationError" : "cudaError"; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = words(error); return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **text) { *text = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR"; return CUDA_SUCCESS; }
