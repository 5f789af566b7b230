# polyattn_warnings(target): what the project's own programs are compiled with. Headers of other projects are system headers.
function(polyattn_warnings target)
  if(NOT MSVC)
    target_compile_options(${target} PRIVATE -Wall -Wextra -Wshadow -Wconversion)
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # g++ 12 reports assigning an initializer list to an empty vector.
      target_compile_options(${target} PRIVATE -Wno-nonnull)
    endif()
  endif()
endfunction()
