/* A CUDA device that is pretended: memory is address space, kernels are counted and not run.
 *
 * Preloaded before a CUDA build of PyTorch, these files answer the CUDA runtime, the driver, cuBLAS and cuBLASLt.
 * Real: the dispatcher, the host code of each kernel, the caching allocator and its errors, autograd's threads, Triton's
 * compiler and launcher. Pretended: what a kernel computes, and how long it takes.
 *
 *   memory.c   what a card holds, and copies      streams.c  waits, events, captured graphs
 *   device.c   what a card says of itself          kernels.c  launches of the runtime and of the driver
 *   products.c cuBLAS and cuBLASLt
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stddef.h>

/* Counted since the last pretend_reset; answers.py has the same order. */
enum counter {
  KERNELS, PRODUCTS, GRAPHS, IN_GRAPHS, WAITS, TO_DEVICE, TO_HOST, ON_DEVICE, PAGEABLE, FILLS, ALLOCATIONS, FREES, REFUSED, NUM_COUNTERS
};
void count(enum counter what, long times);

/* A card as the driver reports it. */
struct card {
  const char *key, *name;
  int capability, mebibytes, multiprocessors, threads_per_multiprocessor, shared_per_block, l2_mebibytes;
};
const struct card *the_card(void);
long setting(const char *name, long otherwise);

/* Success; or the error of a process forked from one that used the device, as the real runtime gives it. */
cudaError_t ready(void);
cudaError_t failed(cudaError_t error); /* remembers it for cudaGetLastError */
#define READY do { if (ready()) return failed(cudaErrorInitializationError); } while (0)
#define DRIVER_READY do { if (ready()) return CUDA_ERROR_NOT_INITIALIZED; } while (0)

/* Device memory: false where the card is full. */
int take_memory(void **where, size_t bytes, int on_host);
void give_memory(void *where);

/* A kernel by name, of the runtime or of a loaded module. */
struct kernel { const void *stub; const char *name; long launched; int shared_limit; };
void repeat_kernel(struct kernel *kernel);

/* A captured graph keeps its launches; a launch on a capturing stream goes there and is not counted yet. */
struct graph;
struct graph *capturing(const void *stream);
void keep_launch(struct graph *graph, struct kernel *kernel);
cudaError_t unsafe_while_capturing(void);

void *new_handle(void);
void unanswered(const char *name); /* said once, with PRETEND_LOUD=1 */
