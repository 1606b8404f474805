// The numbers of a point in the outputs of the closer look, and how far two looks differ.

/** A block's affinities of a point to the regions, mean of the groups, from the least on: {values, rows, columns}. */
export function affinityOf(look, i, block, point) {
  const places = block.regions * block.regions;
  const values = new Float32Array(places);
  for (let group = 0; group < block.groups; group++) {
    const own = cell(look.outputs[`affinity${i}`].data, block, group, point, places);
    own.forEach((value, place) => { values[place] += value / block.groups; });
  }
  const least = Math.min(...values);
  return { values: values.map((value) => value - least), rows: block.regions, columns: block.regions };
}

/** A block's kernels of a point, the large ones first: [{values, rows, columns, box, group}]. */
export function kernelsOf(look, i, block, point) {
  const [row, column] = positionOf(block, point);
  return block.sizes.map((size, j) => ({ size, data: look.outputs[`kernels${i}_${j}`].data })).reverse().flatMap(
    ({ size, data }) => {
      const left = windowStart(column, block.columns, size) / block.columns;
      const top = windowStart(row, block.rows, size) / block.rows;
      const box = [left, top, size / block.columns, size / block.rows]; // shares of the square
      return Array.from({ length: block.groups }, (_, group) => ({
        values: cell(data, block, group, point, size * size), rows: size, columns: size, box, group: group + 1,
      }));
    },
  );
}

/** How far a block's affinities and large kernels differ between two looks; as overlock kernels measures it. */
export function changeOf(before, after, i, block) {
  const large = `kernels${i}_${block.sizes.length - 1}`;
  const [taps, others] = [before.outputs[large].data, after.outputs[large].data];
  let moved = 0;
  taps.forEach((tap, place) => { moved += Math.abs(tap - others[place]) / 2; });
  const [first, second] = [before.outputs[`affinity${i}`].data, after.outputs[`affinity${i}`].data];
  let difference = 0;
  let norm = 0;
  first.forEach((value, place) => {
    difference += (value - second[place]) ** 2;
    norm += value ** 2;
  });
  return { kernels: moved / (block.groups * block.rows * block.columns), affinity: Math.sqrt(difference / norm) };
}

function positionOf({ rows, columns }, [x, y]) {
  return [Math.min(Math.floor(y * rows), rows - 1), Math.min(Math.floor(x * columns), columns - 1)];
}

// Windows are centred on their place, and shifted at the borders to lie inside the map.
function windowStart(place, side, size) {
  return Math.min(Math.max(place - Math.floor(size / 2), 0), side - size);
}

function cell(data, block, group, point, length) {
  const [row, column] = positionOf(block, point);
  const start = ((group * block.rows + row) * block.columns + column) * length;
  return data.subarray(start, start + length);
}
