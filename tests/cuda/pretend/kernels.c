/* Launches: by the runtime (PyTorch, bitsandbytes) and by the driver (Triton, inductor), counted by kernel name. */
#include "pretend.h"
#include <elf.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* PyTorch registers some 100,000 kernels; the table stays half empty. */
#define ROOM (1l << 19)
static struct kernel *table[ROOM];
static struct kernel unnamed = {NULL, "?", 0, 49152};
static struct kernel **of_modules;
static long num_of_modules;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static long place_of(const void *stub) { return ((unsigned long)stub * 0x9E3779B97F4A7C15ul) >> 45; }
static struct kernel *new_kernel(const void *stub, const char *name) {
  struct kernel *kernel = calloc(1, sizeof *kernel);
  *kernel = (struct kernel){stub, strdup(name ? name : "?"), 0, 49152};
  return kernel;
}
static struct kernel *kernel_of(const void *stub) {
  for (long i = place_of(stub); table[i]; i = (i + 1) % ROOM)
    if (table[i]->stub == stub) return table[i];
  return &unnamed;
}

/* Names and counts one after another, for answers.py: returns the next place, or -1 at the end. */
static struct kernel *at(long place) { return place < ROOM ? table[place] : place < ROOM + num_of_modules ? of_modules[place - ROOM] : NULL; }
long pretend_next_kernel(long from, const char **name, long *launched) {
  for (long i = from; i < ROOM + num_of_modules; i++)
    if (at(i) && at(i)->launched) { *name = at(i)->name; *launched = at(i)->launched; return i + 1; }
  return -1;
}
void pretend_forget_kernels(void) {
  for (long i = 0; i < ROOM + num_of_modules; i++)
    if (at(i)) at(i)->launched = 0;
}

void repeat_kernel(struct kernel *kernel) { __atomic_add_fetch(&kernel->launched, 1, __ATOMIC_RELAXED); }

/* What a real card refuses at a launch: blocks too large or empty, more shared memory than was asked for. */
static cudaError_t launch(struct kernel *kernel, dim3 grid, dim3 block, size_t shared, const void *stream) {
  READY;
  int empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
  if (empty || (long)block.x * block.y * block.z > 1024 || grid.y > 65535 || grid.z > 65535) return failed(cudaErrorInvalidConfiguration);
  if (shared > (size_t)kernel->shared_limit) return failed(cudaErrorInvalidValue);
  if (capturing(stream)) { keep_launch(capturing(stream), kernel); return cudaSuccess; }
  count(KERNELS, 1);
  repeat_kernel(kernel);
  return cudaSuccess;
}

static cudaError_t allow_shared(struct kernel *kernel, int bytes) {
  if (bytes > the_card()->shared_per_block) return failed(cudaErrorInvalidValue);
  if (bytes > kernel->shared_limit) kernel->shared_limit = bytes;
  return cudaSuccess;
}

/* ---- the runtime ---- */

void **__cudaRegisterFatBinary(void *image) { static void *handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t bytes, int constant, int global) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterFunction(void **handle, const char *stub, char *function, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
  pthread_mutex_lock(&lock);
  long i = place_of(stub);
  while (table[i] && table[i]->stub != stub) i = (i + 1) % ROOM;
  if (!table[i]) table[i] = new_kernel(stub, name);
  pthread_mutex_unlock(&lock);
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } asked;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  asked.grid = grid; asked.block = block; asked.shared = shared; asked.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = asked.grid; *block = asked.block; *shared = asked.shared; *(void **)stream = asked.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) { *kernel = (cudaKernel_t)stub; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) { return launch(kernel_of(kernel), grid, block, shared, stream); }
cudaError_t cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) { return launch(kernel_of(stub), grid, block, shared, stream); }
cudaError_t cudaLaunchCooperativeKernel(const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) { return launch(kernel_of(stub), grid, block, shared, stream); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *stub, void **arguments) { return launch(kernel_of(stub), how->gridDim, how->blockDim, how->dynamicSmemBytes, how->stream); }
cudaError_t cudaGetFuncBySymbol(cudaFunction_t *function, const void *stub) { *function = (cudaFunction_t)kernel_of(stub); return cudaSuccess; }

cudaError_t cudaFuncSetAttribute(const void *stub, enum cudaFuncAttribute which, int value) {
  READY;
  return which == cudaFuncAttributeMaxDynamicSharedMemorySize ? allow_shared(kernel_of(stub), value) : cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *stub) {
  READY;
  memset(of, 0, sizeof *of);
  of->maxThreadsPerBlock = 1024;
  of->numRegs = 32;
  of->maxDynamicSharedSizeBytes = kernel_of(stub)->shared_limit;
  of->ptxVersion = of->binaryVersion = the_card()->capability == 89 ? 86 : the_card()->capability; /* PyTorch's wheels have no sm_89 */
  return cudaSuccess;
}
static cudaError_t two_blocks(int *blocks) { READY; *blocks = 2; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *stub, int size, size_t shared) { return two_blocks(blocks); }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *stub, int size, size_t shared, unsigned flags) { return two_blocks(blocks); }

/* ---- the driver: Triton's and inductor's compiled kernels ---- */

/* The compute capability a cubin was compiled for, or 0 where the image is no cubin (PTX is compiled by the driver).
 * measured: ptxas 13.0 and 12.9 keep it in bits 8-15 and 0-7 of the flags, told apart by the ABI version. */
static int compiled_for(const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return 0;
  return header->e_ident[EI_ABIVERSION] >= 8 ? (header->e_flags >> 8) & 0xff : header->e_flags & 0xff;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  DRIVER_READY;
  int from = compiled_for(image), here = the_card()->capability;
  if (from && (from / 10 != here / 10 || from > here)) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  *module = new_handle();
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) { return cuModuleLoadData(module, image); }
CUresult cuModuleLoad(CUmodule *module, const char *path) {
  Elf64_Ehdr header = {0};
  FILE *file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  size_t got = fread(&header, 1, sizeof header, file);
  fclose(file);
  return got ? cuModuleLoadData(module, &header) : CUDA_ERROR_INVALID_IMAGE;
}
CUresult cuModuleUnload(CUmodule module) { free(module); return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  DRIVER_READY;
  pthread_mutex_lock(&lock);
  of_modules = realloc(of_modules, (num_of_modules + 1) * sizeof *of_modules);
  of_modules[num_of_modules] = new_kernel(NULL, name);
  *function = (CUfunction)of_modules[num_of_modules++];
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
  return (CUresult)launch((struct kernel *)function, (dim3){gx, gy, gz}, (dim3){bx, by, bz}, shared, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments, void **extra) {
  return cuLaunchKernel(function, how->gridDimX, how->gridDimY, how->gridDimZ, how->blockDimX, how->blockDimY, how->blockDimZ, how->sharedMemBytes, how->hStream, arguments, extra);
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments) {
  return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, NULL);
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  DRIVER_READY;
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32
         : which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? ((struct kernel *)function)->shared_limit : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  DRIVER_READY;
  if (which > CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED + 1) return CUDA_ERROR_INVALID_VALUE; /* modes of later cards */
  return which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? (CUresult)allow_shared((struct kernel *)function, value) : CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int size, size_t shared) { return (CUresult)two_blocks(blocks); }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *how) { return (CUresult)two_blocks(clusters); }
