# Fused multiply-adds make up most of what the inner loops of the float kernels do: from the PTX that nvcc makes.
set(ptx ${WORK}/kernels.ptx)
execute_process(COMMAND ${NVCC} -std=c++20 -arch=compute_80 -ptx -I${SOURCE}/include ${SOURCE}/tests/cuda/kernels.cu -o ${ptx} COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND awk -v kernels=apply_tilesIf|gradient_tilesIf|sum_chunksIf|apply_statesIf -v least=60 -f ${SOURCE}/tests/cuda/inner_loops.awk ${ptx} COMMAND_ERROR_IS_FATAL ANY)
