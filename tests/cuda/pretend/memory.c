/* What a card holds: address space is taken and given back, and nothing else of a full card is pretended. */
#include "pretend.h"
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum kind { UNKNOWN, HOST, DEVICE, RESERVED };
struct block { char *start; size_t bytes; enum kind kind; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct block *blocks;
static long num_blocks, room_for_blocks;
static size_t in_use, peak;
static long counters[NUM_COUNTERS];
static __thread cudaError_t last_error;

void count(enum counter what, long times) { __atomic_add_fetch(&counters[what], times, __ATOMIC_RELAXED); }
long pretend_count(int what) { return counters[what]; }
size_t pretend_in_use(void) { return in_use; }
size_t pretend_peak(void) { return peak; }
void pretend_forget_counts(void) { memset(counters, 0, sizeof counters); peak = in_use; }

long setting(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value && *value ? atol(value) : otherwise;
}

cudaError_t failed(cudaError_t error) { last_error = error; return error; }

cudaError_t ready(void) {
  static pid_t owner;
  if (!owner) owner = getpid();
  return owner == getpid() ? cudaSuccess : cudaErrorInitializationError;
}

/* assumed: the driver's context takes 400 MiB, as cards of these kinds show with PyTorch's kernels loaded lazily. */
static size_t all_bytes(void) { return (size_t)the_card()->mebibytes << 20; }
static size_t usable_bytes(void) { return all_bytes() - ((size_t)setting("PRETEND_CONTEXT_MIB", 400) << 20); }
static size_t copied_at_most(void) {
  static long bytes = -1;
  if (bytes < 0) bytes = setting("PRETEND_COPY_MAX", 1 << 20);
  return (size_t)bytes;
}

static size_t whole_pages(size_t bytes) { return bytes ? (bytes + 4095) & ~(size_t)4095 : 4096; }

static void remember(void *start, size_t bytes, enum kind kind) {
  if (num_blocks == room_for_blocks) {
    room_for_blocks = room_for_blocks ? 2 * room_for_blocks : 1024;
    blocks = realloc(blocks, room_for_blocks * sizeof *blocks);
  }
  blocks[num_blocks++] = (struct block){start, bytes, kind};
}

static int charge(size_t bytes) {
  if (in_use + bytes > usable_bytes()) { count(REFUSED, 1); return 0; }
  in_use += bytes;
  if (in_use > peak) peak = in_use;
  return 1;
}

static void *address_space(size_t bytes) {
  void *start = mmap(0, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return start == MAP_FAILED ? NULL : start;
}

int take_memory(void **where, size_t bytes, int on_host) {
  pthread_mutex_lock(&lock);
  int fits = on_host || charge(bytes);
  void *start = fits ? address_space(bytes) : NULL;
  if (start) remember(start, bytes, on_host ? HOST : DEVICE);
  pthread_mutex_unlock(&lock);
  if (!start) return 0;
  if (!on_host) count(ALLOCATIONS, 1);
  *where = start;
  return 1;
}

void give_memory(void *where) {
  pthread_mutex_lock(&lock);
  for (long i = num_blocks - 1; where && i >= 0; i--) {
    if (blocks[i].start != where) continue;
    munmap(where, whole_pages(blocks[i].bytes));
    if (blocks[i].kind == DEVICE) { in_use -= blocks[i].bytes; count(FREES, 1); }
    blocks[i] = blocks[--num_blocks];
    break;
  }
  pthread_mutex_unlock(&lock);
}

static enum kind kind_of(const void *pointer) {
  enum kind found = UNKNOWN;
  pthread_mutex_lock(&lock);
  for (long i = 0; i < num_blocks && !found; i++)
    if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + whole_pages(blocks[i].bytes)) found = blocks[i].kind;
  pthread_mutex_unlock(&lock);
  return found == RESERVED ? DEVICE : found;
}

static cudaError_t allocate(void **where, size_t bytes, int on_host) {
  READY;
  if (unsafe_while_capturing()) return failed(cudaErrorStreamCaptureUnsupported);
  return take_memory(where, bytes, on_host) ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

cudaError_t cudaMalloc(void **where, size_t bytes) { return allocate(where, bytes, 0); }
cudaError_t cudaMallocAsync(void **where, size_t bytes, cudaStream_t stream) { return allocate(where, bytes, 0); }
cudaError_t cudaMallocManaged(void **where, size_t bytes, unsigned flags) { return allocate(where, bytes, 0); }
cudaError_t cudaHostAlloc(void **where, size_t bytes, unsigned flags) { return allocate(where, bytes, 1); }
cudaError_t cudaMallocHost(void **where, size_t bytes) { return allocate(where, bytes, 1); }
cudaError_t cudaFree(void *where) { READY; give_memory(where); return cudaSuccess; }
cudaError_t cudaFreeAsync(void *where, cudaStream_t stream) { READY; give_memory(where); return cudaSuccess; }
cudaError_t cudaFreeHost(void *where) { give_memory(where); return cudaSuccess; }

cudaError_t cudaHostRegister(void *where, size_t bytes, unsigned flags) {
  READY;
  pthread_mutex_lock(&lock);
  remember(where, bytes, HOST);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *where) {
  pthread_mutex_lock(&lock);
  for (long i = num_blocks - 1; i >= 0; i--)
    if (blocks[i].start == where) { blocks[i] = blocks[--num_blocks]; break; }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  READY;
  *total = all_bytes();
  *free_bytes = usable_bytes() - in_use;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  READY;
  memset(found, 0, sizeof *found);
  enum kind kind = kind_of(pointer);
  found->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == HOST ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  if (kind) found->devicePointer = (void *)pointer;
  if (kind == HOST) found->hostPointer = (void *)pointer;
  return cudaSuccess;
}

/* Triton asks this of each pointer, so that a tensor of the host is refused. */
CUresult cuPointerGetAttribute(void *answer, CUpointer_attribute attribute, CUdeviceptr pointer) {
  DRIVER_READY;
  enum kind kind = kind_of((void *)pointer);
  if (!kind) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)answer = pointer;
  else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(unsigned *)answer = kind == HOST ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
  else *(int *)answer = 0;
  return CUDA_SUCCESS;
}

/* ---- copies: small ones are made, large ones only counted ---- */

static cudaError_t copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  READY;
  int to_device = kind_of(to) == DEVICE, from_device = kind_of(from) == DEVICE;
  count(to_device && from_device ? ON_DEVICE : to_device ? TO_DEVICE : TO_HOST, 1);
  if (!kind_of(to) || !kind_of(from)) count(PAGEABLE, 1);
  if (bytes <= copied_at_most()) memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  cudaError_t error = copy(to, from, bytes, kind);
  return error ? error : cudaStreamSynchronize(0);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
  READY;
  count(ON_DEVICE, 1);
  for (size_t row = 0; width * height <= copied_at_most() && row < height; row++)
    memcpy((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *where, int value, size_t bytes) {
  READY;
  count(FILLS, 1);
  if (bytes <= copied_at_most()) memset(where, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *where, int value, size_t bytes, cudaStream_t stream) { return cudaMemset(where, value, bytes); }
cudaError_t cudaGetSymbolAddress(void **where, const void *symbol) { READY; return take_memory(where, 4096, 1) ? cudaSuccess : failed(cudaErrorMemoryAllocation); }

/* ---- the driver's own allocations, and its pages for expandable segments ---- */

CUresult cuMemAlloc(CUdeviceptr *where, size_t bytes) {
  DRIVER_READY;
  return take_memory((void **)where, bytes, 0) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFree(CUdeviceptr where) { DRIVER_READY; give_memory((void *)where); return CUDA_SUCCESS; }
CUresult cuMemGetInfo(size_t *free_bytes, size_t *total) { return (CUresult)cudaMemGetInfo(free_bytes, total); }

CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *of, CUmemAllocationGranularity_flags flags) {
  *bytes = 2 << 20;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *where, size_t bytes, size_t alignment, CUdeviceptr hint, unsigned long long flags) {
  DRIVER_READY;
  void *start = address_space(bytes);
  if (!start) return CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_lock(&lock);
  remember(start, bytes, RESERVED);
  pthread_mutex_unlock(&lock);
  *where = (CUdeviceptr)start;
  return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr where, size_t bytes) { give_memory((void *)where); return CUDA_SUCCESS; }

CUresult cuMemCreate(CUmemGenericAllocationHandle *page, size_t bytes, const CUmemAllocationProp *of, unsigned long long flags) {
  DRIVER_READY;
  pthread_mutex_lock(&lock);
  int fits = charge(bytes);
  pthread_mutex_unlock(&lock);
  *page = bytes;
  if (fits) count(ALLOCATIONS, 1);
  return fits ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle page) {
  pthread_mutex_lock(&lock);
  in_use -= page;
  pthread_mutex_unlock(&lock);
  count(FREES, 1);
  return CUDA_SUCCESS;
}

/* ---- errors ---- */

cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
