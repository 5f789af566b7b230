# Compiles the kernels for one architecture and fails if ptxas reports spilled registers in one of ours (CUB's radix sort, which routing.cuh calls, spills a few bytes on 10.0 and 12.0).
set(cubin ${WORK}/kernels_sm_${ARCHITECTURE}.cubin)
execute_process(COMMAND ${NVCC} -std=c++20 -gencode arch=compute_${ARCHITECTURE},code=sm_${ARCHITECTURE} -Xptxas -v -I${SOURCE}/include -cubin ${SOURCE}/tests/cuda/kernels.cu -o ${cubin}
                RESULT_VARIABLE failed OUTPUT_VARIABLE report ERROR_VARIABLE report)
if(failed)
  message(FATAL_ERROR "${report}")
endif()
string(REGEX MATCHALL "Function properties for _ZN8polyattn[^\n]*\n[^\n]*[1-9][0-9]* bytes spill[^\n]*" spills "${report}")
string(REGEX MATCHALL "Compiling entry function '_ZN8polyattn" kernels "${report}")
list(LENGTH kernels count)
if(spills OR count EQUAL 0)
  message(FATAL_ERROR "of ${count} kernels for sm_${ARCHITECTURE} these spill: ${spills}")
endif()
message("${count} kernels for sm_${ARCHITECTURE}, no spills")
