# The kernel tests and the numbers, compiled by clang.
file(MAKE_DIRECTORY ${WORK})
set(includes)
list(REMOVE_ITEM INCLUDES /usr/include)  # named as a system folder it would hide C's headers from C++'s
foreach(directory ${INCLUDES})
  list(APPEND includes -isystem ${directory})
endforeach()
foreach(name kernels numbers)
  execute_process(COMMAND ${COMPILER} -std=c++20 -O2 -march=native -Wall -Wextra -Wshadow -Wconversion -I${SOURCE}/include -I${SOURCE}/tests ${includes}
                          ${SOURCE}/tests/${name}.cpp ${SOURCE}/tests/support/main.cpp -o ${WORK}/${name} RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "clang does not compile ${name}.cpp")
  endif()
  execute_process(COMMAND ${WORK}/${name} RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${name} fails when compiled by clang")
  endif()
endforeach()
