# What an emulator counts while kernels run, beside the least that the work needs: prints a table and fails where a limit is passed. Heads of 64
# columns in float.  cmake -DRUN=<cudaemu-run> -DPROGRAM=<counts> -DWORK=<folder> -P counts.cmake
set(failed 0)
message("| kernel | work | warp instructions | per | sectors loaded / ideal | bank conflicts |\n|---|---|---|---|---|---|")

# count(kind tokens pass): the kernels of one run.
function(count kind tokens pass)
  set(file ${WORK}/counts_${kind}_${pass}.json)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env CUDAEMU_STATS=json CUDAEMU_STATS_FILE=${file} ${RUN} ${PROGRAM} ${kind} ${tokens} ${pass} RESULT_VARIABLE result)
  if(result)
    message(FATAL_ERROR "counts ${kind} ${tokens} ${pass}: ${result}")
  endif()
  file(READ ${file} json)
  set(json "${json}" PARENT_SCOPE)
endfunction()

# kernel(name work units unit ideal most_sectors most_instructions conflicts): the line of one kernel. Ratios in hundredths, instructions per unit in tenths.
function(kernel name work units unit ideal most_sectors most_instructions conflicts)
  string(JSON count LENGTH "${json}" kernels)
  math(EXPR last "${count} - 1")
  foreach(i RANGE ${last})
    string(JSON full GET "${json}" kernels ${i} name)
    if(NOT full MATCHES "::${name}<")
      continue()
    endif()
    foreach(field launches winst gldSec sldWave sstWave sIdeal)
      string(JSON ${field} GET "${json}" kernels ${i} ${field})
    endforeach()
    math(EXPR instructions "${winst} * 10 / ${units} / ${launches}")
    math(EXPR sectors "${gldSec} * 100 / (${ideal}) / ${launches}")
    math(EXPR conflicting "${sldWave} + ${sstWave} - ${sIdeal}")
    string(REGEX REPLACE "(.)$" ".\\1" instructions_text "${instructions}")
    string(REGEX REPLACE "(..)$" ".\\1" sectors_text "${sectors}")
    message("| `${name}` | ${work} | ${instructions_text} | ${unit} | ${sectors_text} | ${conflicting} |")
    if(sectors GREATER most_sectors OR instructions GREATER most_instructions OR (conflicts STREQUAL "none" AND NOT conflicting EQUAL 0))
      message("   beyond its limits: ${most_sectors} hundredths of the ideal, ${most_instructions} tenths of an instruction, conflicts ${conflicts}")
      set(failed 1 PARENT_SCOPE)
    endif()
    return()
  endforeach()
  message(FATAL_ERROR "no kernel ${name} has run")
endfunction()

# Edges: 512 rows of 96 edges. A row is 8 sectors of 32 bytes; a token's number and a weight are 4 bytes; offsets, q and the row's state are read once.
set(rows 512)
math(EXPR edges "${rows} * 96")
count(edges ${rows} forward)
kernel(score_edges "random edges" ${edges} edge "${edges} * 8 + ${edges} / 8 + ${rows} * 8 + ${rows} / 2" 110 240 none)
kernel(apply_edges "hop over random edges" ${edges} edge "${edges} * 8 + ${edges} / 4 + ${rows} / 2 + ${rows} / 4" 110 140 none)
count(edges ${rows} backward)
kernel(gradient_edges "random edges" ${edges} edge "${edges} * 8 + ${edges} / 4 + ${rows} * 8 + ${rows} / 2" 110 240 none)

# Dense: every group of 64 tokens reads its own rows once and those of all others.
set(n 512)
math(EXPR pairs "${n} * ${n} / 32")
count(dense ${n} forward)
kernel(apply_tiles "dense" ${pairs} "32 pairs" "${n} * 8 + ${n} / 64 * ${n} * 16" 120 2400 none)
count(dense ${n} backward)
kernel(gradient_tiles "dense" ${pairs} "32 pairs" "${n} * 16 + ${n} / 64 * ${n} * 16" 120 3600 none)

# Kernel attention, causal, one product for the values and one of four columns for the denominators: a tile reads its own rows, the state of all
# tokens before, and the tile on the diagonal. The way from one layout of a tile to the other costs some conflicts once a tile, outside
# the inner loops.
count(linear ${n} forward)
kernel(sum_chunks "causal linear attention" ${n} token "${n} * (16 + 9) / 2" 120 3000 none)
kernel(apply_states "causal linear attention" ${n} token "${n} * (64 + 35) / 4" 120 7000 some)

if(failed)
  message(FATAL_ERROR "some counts are beyond their limits")
endif()
