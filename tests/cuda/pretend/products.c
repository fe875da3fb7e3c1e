/* cuBLAS and cuBLASLt: products are counted with their FLOP, and not made. */
#include "pretend.h"
#define __CUDA_FP16_H__ /* the real headers want CCCL, which no wheel of PyTorch's brings; a half is two bytes to us */
#define __CUDA_BF16_H__
typedef struct { unsigned short bits; } __half, __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double flop;
double pretend_flop(void) { return flop; }
void pretend_forget_flop(void) { flop = 0; }

static struct kernel a_product = {NULL, "a product of cuBLAS", 0, 0};
static cublasStatus_t product(const void *stream, double m, double n, double k, double batch) {
  if (ready()) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (capturing(stream)) { keep_launch(capturing(stream), &a_product); return CUBLAS_STATUS_SUCCESS; }
  count(PRODUCTS, 1);
  pthread_mutex_lock(&lock);
  flop += 2 * m * n * k * batch;
  pthread_mutex_unlock(&lock);
  return CUBLAS_STATUS_SUCCESS;
}

/* A handle keeps its stream. assumed: 8 MiB on the card each, so that a full card refuses one as the real library does. */
struct handle { void *stream, *memory; };
cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
  if (ready()) return CUBLAS_STATUS_NOT_INITIALIZED;
  struct handle *made = new_handle();
  if (!take_memory(&made->memory, 8 << 20, 0)) { free(made); return CUBLAS_STATUS_ALLOC_FAILED; }
  *handle = (cublasHandle_t)made;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  give_memory(((struct handle *)handle)->memory);
  free(handle);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) { ((struct handle *)handle)->stream = stream; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t *stream) { *stream = ((struct handle *)handle)->stream; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetVersion_v2(cublasHandle_t handle, int *version) { *version = CUBLAS_VERSION; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) { *mode = CUBLAS_POINTER_MODE_HOST; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) { *mode = CUBLAS_DEFAULT_MATH; return CUBLAS_STATUS_SUCCESS; }
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

static const void *stream_of(cublasHandle_t handle) { return ((struct handle *)handle)->stream; }
#define SHAPE cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k
#define PLAIN(name, scalar, element) \
  cublasStatus_t name(SHAPE, const scalar *alpha, const element *a, int lda, const element *b, int ldb, const scalar *beta, element *c, int ldc) { return product(stream_of(handle), m, n, k, 1); }
PLAIN(cublasSgemm_v2, float, float)
PLAIN(cublasDgemm_v2, double, double)
#define BATCHED(name, element) \
  cublasStatus_t name(SHAPE, const element *alpha, const element *a, int lda, long long sa, const element *b, int ldb, long long sb, const element *beta, element *c, int ldc, long long sc, int batch) { return product(stream_of(handle), m, n, k, batch); }
BATCHED(cublasSgemmStridedBatched, float)
BATCHED(cublasDgemmStridedBatched, double)
#define VECTOR(name, element) \
  cublasStatus_t name(cublasHandle_t handle, cublasOperation_t t, int m, int n, const element *alpha, const element *a, int lda, const element *x, int ix, const element *beta, element *y, int iy) { return product(stream_of(handle), m, n, 1, 1); }
VECTOR(cublasSgemv_v2, float)
VECTOR(cublasDgemv_v2, double)

cublasStatus_t cublasGemmEx(SHAPE, const void *alpha, const void *a, cudaDataType at, int lda, const void *b, cudaDataType bt, int ldb, const void *beta, void *c, cudaDataType ct, int ldc, cublasComputeType_t how, cublasGemmAlgo_t algorithm) {
  return product(stream_of(handle), m, n, k, 1);
}
cublasStatus_t cublasSgemmEx(SHAPE, const float *alpha, const void *a, cudaDataType at, int lda, const void *b, cudaDataType bt, int ldb, const float *beta, void *c, cudaDataType ct, int ldc) {
  return product(stream_of(handle), m, n, k, 1);
}
cublasStatus_t cublasGemmStridedBatchedEx(SHAPE, const void *alpha, const void *a, cudaDataType at, int lda, long long sa, const void *b, cudaDataType bt, int ldb, long long sb, const void *beta, void *c, cudaDataType ct, int ldc, long long sc, int batch, cublasComputeType_t how, cublasGemmAlgo_t algorithm) {
  return product(stream_of(handle), m, n, k, batch);
}

/* ---- cuBLASLt: shapes stand in descriptors that are opaque to its users; ours fit in the first bytes of theirs ---- */

struct layout { uint64_t rows, columns; int32_t batch; };
struct operation { int32_t a, b; };
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { if (ready()) return CUBLAS_STATUS_NOT_INITIALIZED; *handle = new_handle(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { free(handle); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t columns, int64_t ld) {
  struct layout *made = new_handle();
  *made = (struct layout){rows, columns, 1};
  *layout = (cublasLtMatrixLayout_t)made;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { free(layout); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t which, const void *value, size_t bytes) {
  if (which == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) memcpy(&((struct layout *)layout)->batch, value, sizeof(int32_t));
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *operation, cublasComputeType_t how, cudaDataType scale) { *operation = new_handle(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) { free(operation); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t which, const void *value, size_t bytes) {
  if (which == CUBLASLT_MATMUL_DESC_TRANSA) memcpy(&((struct operation *)operation)->a, value, sizeof(int32_t));
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) { *preference = new_handle(); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { free(preference); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t *results, int *found) {
  memset(results, 0, sizeof *results);
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void *alpha, const void *a, cublasLtMatrixLayout_t al, const void *b, cublasLtMatrixLayout_t bl, const void *beta, const void *c, cublasLtMatrixLayout_t cl, void *d, cublasLtMatrixLayout_t dl, const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t bytes, cudaStream_t stream) {
  struct layout *left = (struct layout *)al, *out = (struct layout *)dl;
  double inner = ((struct operation *)operation)->a == CUBLAS_OP_N ? left->columns : left->rows;
  return product(stream, out->rows, out->columns, inner, out->batch);
}
