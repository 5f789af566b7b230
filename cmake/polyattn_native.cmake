# polyattn_native(target): compiles a target for the CPU of this machine. Without it xsimd means SSE2.
function(polyattn_native target)
  if(MSVC)
    target_compile_options(${target} PRIVATE /arch:AVX2)
  else()
    target_compile_options(${target} PRIVATE -march=native)
  endif()
endfunction()
